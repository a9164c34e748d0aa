"""Faults of published code that can be seen in how a program is written, each with a test that would see it; the list is in test_pitfalls.py."""
import ast, builtins, re, symtable, sys, tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {str(path.relative_to(ROOT/'talking_face')): path.read_text() for path in sorted((ROOT/'talking_face').rglob('*.py'))}


def dotted(node: ast.expr) -> str:
    "The name that is called: 'torch.load'; of something more complicated only its end: '.load'."
    if isinstance(node, ast.Name): return node.id
    return f'{dotted(node.value)}.{node.attr}' if isinstance(node, ast.Attribute) else ''


FORBIDDEN_CALLS = {'input', 'eval', 'exec', 'plt.show', 'pyplot.show', 'os.system', 'pickle.load', 'pickle.loads', 'pickle.Unpickler',
                   'torch.cuda.current_device'}
EXITS = {'exit', 'quit', 'sys.exit', 'os._exit', 'torch.cuda.set_device'}      # a program may do so to itself and its workers, a network may not
FORBIDDEN_WORDS = re.compile(r"\.tostring_rgb|\.buffer_rgba|\.print_to_buffer|LandmarksType\._[23]D|['\"]cuda:\d")     # figures read back, one device
JUDGED = {ast.ExceptHandler, ast.While, ast.FunctionDef, ast.Raise, ast.Call, ast.Import, ast.ImportFrom}
WAITING = {'item', 'cpu', 'numpy', 'tolist', 'isnan', 'isfinite'}


def fault_of(node: ast.AST, library: bool) -> str:
    "What is wrong with one node, or nothing."
    if isinstance(node, ast.ExceptHandler):
        silent = all(isinstance(line, (ast.Pass, ast.Continue)) for line in node.body)
        return 'catches everything' if node.type is None or silent and dotted(node.type) in ('Exception', 'BaseException') else ''
    if isinstance(node, ast.While) and isinstance(node.test, ast.Constant):
        handlers = [inner for inner in ast.walk(node) if isinstance(inner, ast.ExceptHandler)]
        return 'tries for ever' * any(not any(isinstance(line, (ast.Raise, ast.Return, ast.Break)) for line in ast.walk(inner)) for inner in handlers)
    if isinstance(node, ast.FunctionDef) and node.name in ('forward', 'maps', 'features', 'score', 'project', 'stages'):
        calls = {dotted(inner.func).split('.')[-1] for inner in ast.walk(node) if isinstance(inner, ast.Call)}
        return f'{node.name} waits for a number: {calls & WAITING}' * bool(calls & WAITING)
    if isinstance(node, ast.Raise): return 'ends the process' * (library and node.exc is not None and 'SystemExit' in ast.unparse(node.exc))
    if not isinstance(node, ast.Call): return ''
    call, options = dotted(node.func), {option.arg: getattr(option.value, 'value', None) for option in node.keywords}
    pickles = call == 'torch.load' and options.get('weights_only') is not True or options.get('allow_pickle') is True
    return f'calls {call}' * (pickles or call in FORBIDDEN_CALLS or library and call in EXITS or call.endswith(('.cuda', '.get_device')))


def imported(node: ast.AST) -> set[str]:
    "The packages that a statement imports, this one left out."
    if isinstance(node, ast.Import): return {alias.name.split('.')[0] for alias in node.names} - {'talking_face'}
    return {node.module.split('.')[0]} - {'talking_face'} if isinstance(node, ast.ImportFrom) and not node.level else set()


def for_people(node: ast.FunctionDef) -> bool:
    "Whether a function makes a figure for somebody: it returns one, shows it in a notebook, or is the bench, which compares us with one."
    returned = ast.unparse(node.returns) if node.returns else ''
    shows = any(isinstance(inner, ast.ImportFrom) and inner.module == 'IPython.display' for inner in ast.walk(node))
    return shows or 'Figure' in returned or 'Widget' in returned or node.name == 'bench_drawing'


def written_faults(source: str, library: bool = True) -> list[str]:
    "What must not be written in a module, each with its line; `library`: a module that others call."
    tree = ast.parse(source)
    figures = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and for_people(node)]
    for_readers = {inner for node in figures for inner in ast.walk(node)}
    inside = lambda words: {inner for node in tree.body if isinstance(node, ast.If) and words in ast.unparse(node.test) for inner in ast.walk(node)}
    as_program, for_checkers = inside("__name__ == '__main__'"), inside('TYPE_CHECKING')
    nodes = [node for node in ast.walk(tree) if type(node) in JUDGED]
    found = [f'{node.lineno}: {fault}' for node in nodes if node not in for_readers and (fault := fault_of(node, library and node not in as_program))]
    lines = {line for node in figures for line in range(node.lineno, node.end_lineno + 1)}
    for number, line in enumerate(source.splitlines(), 1):
        if number not in lines and (word := FORBIDDEN_WORDS.search(line)): found.append(f'{number}: {word[0]}')
    for node in nodes:
        names = imported(node)
        if names & {'imp', 'dill', 'joblib', 'shelve', 'marshal'}: found.append(f'{node.lineno}: imports {", ".join(names)}')
        if 'matplotlib' in names and node not in for_readers | for_checkers: found.append(f'{node.lineno}: matplotlib where no figure is asked for')
    return found


def unknown_names(source: str, name: str) -> list[str]:
    "Names that functions of a module use and nobody defines."
    top = symtable.symtable(source, name, 'exec')
    known = {symbol.get_name() for symbol in top.get_symbols() if symbol.is_assigned() or symbol.is_imported() or symbol.is_namespace()}
    known |= {*dir(builtins), '__file__', '__name__', '__class__'}
    def visit(scope: symtable.SymbolTable) -> list[str]:
        used = [symbol.get_name() for symbol in scope.get_symbols() if symbol.is_referenced() and (symbol.is_global() or scope is top)]
        return [f'{scope.get_name()}: {word}' for word in used if word not in known] + sum(map(visit, scope.get_children()), [])
    return visit(top)


def test_the_package_is_free_of_what_must_not_be_written():
    "AV 17, 18, 37, 43, FS 1.22 to 1.25, 1.36, 2.10, 2.14: silent catches, endless loops, exits, prompts, pickles, figures read back, one device."
    found = {}
    for name, source in SOURCES.items():
        library = name.startswith(('networks', 'few_shot', 'signals')) and name != 'networks/distributed.py'     # its processes leave when one failed
        if faults := written_faults(source, library): found[name] = faults
    assert found == {}


def test_every_name_is_known():
    "AV 2 to 5, FS 3.1, 3.2: names that nobody defines, found when training started."
    assert {name: faults for name, source in SOURCES.items() if (faults := unknown_names(source, name))} == {}


def test_every_package_is_declared():
    "FS 3.4: a package that is hard to install was needed to set one number, also where it had nothing to do."
    project = tomllib.loads((ROOT/'pyproject.toml').read_text())['project']
    providers = packages_distributions() | {'dlib': ['dlib-bin'], 'IPython': ['ipykernel']}
    lines = [*project['dependencies'], *(line for extra in project['optional-dependencies'].values() for line in extra)]
    plain_name = lambda name: re.split('[<>=!~; ]', name)[0].lower().replace('-', '_')
    declared = set(map(plain_name, lines))
    used = {name for source in SOURCES.values() for node in ast.walk(ast.parse(source)) for name in imported(node)} - sys.stdlib_module_names
    assert {name for name in used if not declared & set(map(plain_name, providers.get(name, [name])))} == set()


@pytest.mark.parametrize('source', [
    'try: x()\nexcept: pass', 'try: x()\nexcept Exception: pass', 'for i in a:\n    try: x()\n    except BaseException: continue',
    'while True:\n    try:\n        x = y(); break\n    except IndexError: z()', 'import imp', 'from imp import reload',
    'from matplotlib import pyplot', 'def f(x) -> int:\n    import matplotlib.pyplot',
    'x = figure.canvas.tostring_rgb()', 'FaceAlignment(LandmarksType._2D)', 'x = input("epochs?")', 'exit()',
    'import sys\nsys.exit(0)', 'import torch\ntorch.load(path)', 'torch.load(path, weights_only=False)',
    'np.load(path, allow_pickle=True)', 'import pickle\npickle.load(file)', 'x = x.cuda()', 'torch.cuda.current_device()',
    'device = "cuda:0"', 'plt.show()', 'def forward(self, x):\n    if torch.isnan(x).any(): return 0',
    'def forward(self, x):\n    if x[0, 0].item() != 0: sys.exit()', 'def forward(self, x):\n    raise SystemExit'])
def test_forbidden_writing_is_seen(source): assert written_faults(source)


@pytest.mark.parametrize('source', [
    'def f():\n    return undefined', 'class A:\n    def f(self):\n        return [g(x) for x in self.y]', 'def f(x):\n    return self.y',
    'print(later)'])
def test_unknown_names_are_seen(source): assert unknown_names(source, 'made')
