"""The shape of the notebooks: what a chapter has, what a run has. Every rule has a case that breaks it."""
import ast, copy, re
from collections.abc import Callable
from pathlib import Path

import pytest

from talking_face.core import read_json

ROOT = Path(__file__).resolve().parents[1]
LONGEST_CELL, LARGEST_FILE = 60, 200_000     # lines of a code cell, bytes of a notebook with its outputs


def notebooks(pattern: str) -> dict[str, Path]:
    return {str(path.relative_to(ROOT/'nbs')): path for path in sorted((ROOT/'nbs').glob(pattern))}


CHAPTERS, RUNS = notebooks('[0-9][0-9]_*/*.ipynb'), notebooks('runs/*.ipynb')


def text(cell: dict) -> str:
    return ''.join(cell['source'])


def code_cells(notebook: dict) -> list[dict]:
    return [cell for cell in notebook['cells'] if cell['cell_type'] == 'code']


def exported(cell: dict) -> bool:
    return bool(re.match(r'#\|\s*exporti?\b', text(cell)))


def parsed(cell: dict) -> ast.Module:
    return ast.parse(text(cell))


def prose(notebook: dict) -> str:
    "All Markdown of a notebook without its fenced blocks."
    return re.sub(r'^```.*?^```', '', '\n\n'.join(text(cell) for cell in notebook['cells'] if cell['cell_type'] == 'markdown'), flags=re.MULTILINE | re.DOTALL)


def common_faults(notebook: dict) -> list[str]:
    "What is wrong with any notebook of ours."
    faults, cells = [], code_cells(notebook)
    if notebook['metadata'].get('kernelspec', {}).get('name') != 'python3': faults.append('kernel is not python3')
    if len(re.findall(r'^# ', prose(notebook), re.MULTILINE)) != 1: faults.append('needs exactly one title')
    if not re.match(r'# .+\n\n> .+', text(notebook['cells'][0])): faults.append('must begin with a title and a subtitle in a block quote')
    for number, cell in enumerate(cells):
        if (lines := text(cell).count('\n') + 1) > LONGEST_CELL: faults.append(f'code cell {number} has {lines} lines')
        for output in cell['outputs']:
            if output['output_type'] == 'error': faults.append(f'code cell {number} ends in {output["ename"]}')
            if output.get('name') == 'stderr': faults.append(f'code cell {number} shows messages on stderr: {"".join(output["text"])[:80]!r}')
    return faults


def chapter_faults(name: str, notebook: dict) -> list[str]:
    "What is wrong with a chapter whose path below nbs is `name`."
    faults, cells, words = common_faults(notebook), code_cells(notebook), prose(notebook)
    floor, chapter = re.fullmatch(r'\d\d_(\w+)/\d\d_(\w+)\.ipynb', name).groups()
    module = chapter if floor == 'ground' else f'{floor}.{chapter}'
    if [line for cell in cells for line in text(cell).splitlines() if 'default_exp' in line.split()[:2]] != [f'#| default_exp {module}']: faults.append(f'must export {module}')
    for part in ('After this chapter you ', '**Before this:**', '**Run time:**', '**Source:**'):
        if part not in text(notebook['cells'][0]): faults.append(f'its head does not say {part!r}')
    if not any({'image/png', 'image/jpeg'} & output.get('data', {}).keys() for cell in cells for output in cell['outputs']): faults.append('has no picture')
    if not any(isinstance(node, ast.Assert) for cell in cells if not exported(cell) for node in ast.walk(parsed(cell))): faults.append('tests nothing')
    if '\n## What can go wrong\n' not in words: faults.append('does not say what can go wrong')
    if not re.search(r'\n## Exercises\n+1\. .+\n2\. [^#]+$', words): faults.append('must end with two or more exercises')
    return faults


def untested_names(notebook: dict) -> list[str]:
    "Public functions and classes that nothing in the chapter uses outside their own definition (classes without a body of their own are names only)."
    cells, missing = code_cells(notebook), []
    for number, cell in enumerate(cells):
        for node in parsed(cell).body if exported(cell) else []:
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name[0] == '_': continue
            if isinstance(node, ast.ClassDef) and all(isinstance(part, (ast.Expr, ast.Pass)) for part in node.body): continue
            lines = text(cell).splitlines()
            elsewhere = [*lines[:node.lineno - 1], *lines[node.end_lineno:], *(text(other) for place, other in enumerate(cells) if place != number)]
            if not re.search(rf'\b{node.name}\b', '\n'.join(elsewhere)): missing.append(node.name)
    return missing


def literals(call: ast.Call) -> dict:
    return {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}


def run_faults(notebook: dict) -> list[str]:
    "What is wrong with a notebook for papermill: one cell of commented literals, read by the next, and nothing defined."
    faults, cells = common_faults(notebook), code_cells(notebook)
    if any(cell['outputs'] for cell in cells): faults.append('must be kept without outputs')
    if any(line.startswith('#|') for cell in cells for line in text(cell).splitlines()): faults.append('must not export')
    if any(isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) for cell in cells for node in ast.walk(parsed(cell))): faults.append('must define nothing')
    tagged = [number for number, cell in enumerate(cells) if 'parameters' in cell['metadata'].get('tags', [])]
    if tagged != [0]: return [*faults, f'the first code cell, and no other, must be tagged parameters, not {tagged}']
    declared = {}
    for node, line in zip(parsed(cells[0]).body, text(cells[0]).splitlines()):
        try: declared[node.target.id] = value = ast.literal_eval(node.value)
        except (AttributeError, ValueError): faults.append(f'{line!r} must be: name: type = literal  # meaning'); continue
        if type(value).__name__ != ast.unparse(node.annotation): faults.append(f'{line!r}: the value is not of the type')
        if not re.search(r'  # \S', line): faults.append(f'{line!r} has no comment')
    if len(declared) != text(cells[0]).count('\n') + 1: faults.append('the parameters cell must have one parameter in each line')
    calls = [node for node in ast.walk(parsed(cells[1])) if isinstance(node, ast.Call) and ast.unparse(node.func) == 'read_parameters']
    if len(calls) != 1 or ast.unparse(calls[0].args[0]) != 'globals()': return [*faults, 'the second code cell must call read_parameters(globals(), ...) once']
    try: expected = literals(calls[0])
    except ValueError: return [*faults, 'read_parameters must be given literals']
    if [(key, type(value)) for key, value in declared.items()] != [(key, type(value)) for key, value in expected.items()]: faults.append('read_parameters names other parameters or types')
    return faults


def test_there_are_notebooks():
    assert len(CHAPTERS) >= 20 and len(RUNS) >= 3
    assert (ROOT/'nbs/runs/.notest').is_file()      # nbdev_test must leave them alone: they train for minutes


@pytest.mark.parametrize('name', CHAPTERS)
def test_chapter(name):
    notebook = read_json(CHAPTERS[name])
    assert chapter_faults(name, notebook) == []
    assert untested_names(notebook) == []
    assert CHAPTERS[name].stat().st_size < LARGEST_FILE


@pytest.mark.parametrize('name', RUNS)
def test_run(name):
    assert run_faults(read_json(RUNS[name])) == []


def test_index():
    notebook = read_json(ROOT/'nbs/index.ipynb')
    assert common_faults(notebook) == [] and any(cell['outputs'] for cell in code_cells(notebook))


# ---- the rules can fail ----

def markdown(source: str) -> dict:
    return dict(cell_type='markdown', metadata={}, source=[source])


def code(source: str, *outputs: dict, tags: tuple[str, ...] = ()) -> dict:
    return dict(cell_type='code', metadata=dict(tags=list(tags)) if tags else {}, source=source.splitlines(keepends=True), outputs=list(outputs))


PICTURE = dict(output_type='display_data', data={'image/png': 'iVBO'})
GOOD_CHAPTER = dict(metadata=dict(kernelspec=dict(name='python3')), cells=[
    markdown('# Title\n\n> Subtitle.\n\nAfter this chapter you can.\n\n**Before this:** core. **Run time:** 1 s. **Source:** ours.'),
    code('#| default_exp signals.media'), code('#| export\ndef double(x): return 2 * x\ndef _half(x): return x / 2'), code('assert double(2) == 4', PICTURE),
    markdown('```bash\n# no title\n```\n\n## What can go wrong\n\n- Nothing.'), markdown('## Exercises\n\n1. Double.\n2. Halve.')])
GOOD_RUN = dict(metadata=dict(kernelspec=dict(name='python3')), cells=[
    markdown('# Run: nothing\n\n> Nothing in, nothing out.'), code("out: str = ''    # folder\nsteps: int = 3  # how many", tags=('parameters',)),
    code("from talking_face.runs import read_parameters\ngiven = read_parameters(globals(), out='', steps=0)"), code('print(steps)')])


def changed(notebook: dict, change: Callable[[dict], object]) -> dict:
    result = copy.deepcopy(notebook)
    change(result)
    return result


def put(number: int, cell: dict) -> Callable[[dict], object]:
    return lambda notebook: notebook['cells'].__setitem__(number, cell)


def head(old: str, new: str) -> Callable[[dict], object]:
    return lambda notebook: notebook['cells'].__setitem__(0, markdown(text(notebook['cells'][0]).replace(old, new)))


def test_good_examples_pass():
    assert chapter_faults('02_signals/00_media.ipynb', GOOD_CHAPTER) == [] and untested_names(GOOD_CHAPTER) == [] and run_faults(GOOD_RUN) == []


@pytest.mark.parametrize('change, fault', [
    (lambda notebook: notebook['metadata'].clear(), 'kernel'),
    (lambda notebook: notebook['cells'].append(markdown('# Again')), 'one title'),
    (head('> ', ''), 'subtitle'),
    (head('**Source:**', 'Source'), 'Source'),
    (put(1, code('#| default_exp signals.audio')), 'must export signals.media'),
    (put(3, code('print(double(2))', PICTURE)), 'tests nothing'),
    (put(3, code('assert double(2) == 4')), 'no picture'),
    (put(3, code('assert 1' + '\npass' * LONGEST_CELL, PICTURE)), f'has {LONGEST_CELL + 1} lines'),
    (put(3, code('assert 1', PICTURE, dict(output_type='error', ename='ValueError'))), 'ends in ValueError'),
    (put(3, code('assert 1', PICTURE, dict(output_type='stream', name='stderr', text=['UserWarning']))), 'stderr'),
    (put(4, markdown('All is well.')), 'what can go wrong'),
    (put(5, markdown('## Exercises\n\n1. Double.')), 'exercises'),
    (lambda notebook: notebook['cells'].append(markdown('## Later')), 'exercises')])
def test_bad_chapter_is_seen(change, fault):
    faults = chapter_faults('02_signals/00_media.ipynb', changed(GOOD_CHAPTER, change))
    assert any(fault in found for found in faults), faults


def test_untested_name_is_seen():
    assert untested_names(changed(GOOD_CHAPTER, put(3, code('assert 1')))) == ['double']


@pytest.mark.parametrize('change, fault', [
    (lambda notebook: notebook['cells'][1]['metadata'].clear(), 'tagged parameters'),
    (lambda notebook: notebook['cells'][3]['metadata'].update(tags=['parameters']), 'tagged parameters'),
    (lambda notebook: notebook['cells'].insert(1, code('x = 1')), 'tagged parameters'),
    (put(1, code("out: str = ''  # folder\nsteps: int = 1 + 2  # how many", tags=('parameters',))), 'literal'),
    (put(1, code("out: str = ''  # folder\nsteps = 3  # how many", tags=('parameters',))), 'literal'),
    (put(1, code("out: str = ''  # folder\nsteps: int = 3.0  # how many", tags=('parameters',))), 'not of the type'),
    (put(1, code("out: str = ''  # folder\nsteps: int = 3", tags=('parameters',))), 'no comment'),
    (put(1, code("out: str = ''  # folder\n# why\nsteps: int = 3  # how many", tags=('parameters',))), 'one parameter in each line'),
    (put(2, code('given = 1')), 'read_parameters'),
    (put(2, code("read_parameters(globals(), out='', step=0)")), 'other parameters'),
    (put(2, code("read_parameters(globals(), out='', steps=0.0)")), 'other parameters or types'),
    (put(2, code("read_parameters(globals(), out='', steps=steps)")), 'given literals'),
    (put(3, code('def f(): pass')), 'define nothing'),
    (put(3, code('if True:\n    class A: pass')), 'define nothing'),
    (put(3, code('#| export\nx = 1')), 'not export'),
    (put(3, code('1', PICTURE)), 'without outputs')])
def test_bad_run_is_seen(change, fault):
    faults = run_faults(changed(GOOD_RUN, change))
    assert any(fault in found for found in faults), faults
