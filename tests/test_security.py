"The page on security: what it names exists; and tests of defences that no other file tests."
import ast
import json
import re
import shutil
from pathlib import Path

import pytest
from torch import nn
from transformers import AutoTokenizer

from llava_med.core.registry import UnknownName
from llava_med.core.runs import root
from llava_med.lab.commands import main
from llava_med.lab.tables import html_table
from llava_med.models.anatomy import connector
from llava_med.models.connectors import CONNECTORS
from llava_med.models.exchange import chat_text
from llava_med.models.llava import load, save, tiny_model
from llava_med.ui.widgets import Chat

REPO = Path(__file__).resolve().parents[1]
PAGE = (REPO/'SECURITY.md').read_text(encoding='utf-8')
SOURCES = {p.relative_to(REPO/'llava_med').as_posix(): p.read_text(encoding='utf-8')
           for p in sorted((REPO/'llava_med').rglob('*.py'))}


# The page

def named(text): return re.findall(r'`(test_\w+\.py)::(test_\w+)`', text)


def missing(names):
    "Named tests that are in no file."
    defined = {}
    for f in {f for f, _ in names}:
        path = REPO/'tests'/f
        tree = ast.parse(path.read_text(encoding='utf-8')) if path.exists() else ast.Module([], [])
        defined[f] = {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}
    return [f'{f}::{t}' for f, t in names if t not in defined[f]]


def test_every_test_of_the_page_exists():
    assert len(named(PAGE)) > 35 and not missing(named(PAGE))


def test_every_row_names_a_test():
    rows = [r for r in PAGE.splitlines() if r.startswith('| ') and not r.startswith('| attempt')]
    assert len(rows) > 25 and not [r for r in rows if not named(r)]


def test_every_kind_of_defence_is_on_the_page():
    for word in ('Archives', 'XML', 'Pickles', 'Code from model folders', 'HTML', 'Uploads', 'Keys'):
        assert re.search(rf'(?m)^\*\*{word}', PAGE), word


def test_a_test_that_is_gone_would_be_noticed():
    assert missing([('test_security.py', 'test_gone'), ('test_gone.py', 'test_x')]) == \
        ['test_security.py::test_gone', 'test_gone.py::test_x']


# The source: calls that would run what a file says

def calls(source):
    "Every call as (dotted name, keywords)."
    for n in ast.walk(ast.parse(source)):
        if isinstance(n, ast.Call): yield ast.unparse(n.func), {k.arg: k.value for k in n.keywords}


def unsafe(source, allowed=()):
    "Calls that could run code which a file brings along."
    found = []
    for name, words in calls(source):
        last = name.split('.')[-1]
        value = lambda k: getattr(words.get(k), 'value', None)
        if name in ('eval', 'exec', 'os.system', 'os.popen'): found.append(name)
        if name.startswith(('pickle.', 'dill.', 'joblib.')) and last in ('load', 'loads', 'Unpickler'): found.append(name)
        if name == 'torch.load' and value('weights_only') is not True: found.append(name)
        if value('shell') or value('trust_remote_code') or value('allow_pickle'): found.append(name)
        if re.match(r'(Auto\w+|kind)\.from_pretrained$', name):
            if value('trust_remote_code') is not False and None not in words: found.append(name)
        if name in ('yaml.load', 'yaml.unsafe_load', 'yaml.full_load', 'yaml.load_all'): found.append(name)
    return [n for n in found if n not in allowed]


def test_pickles_are_read_in_three_known_places():
    "Of a run's own processes twice, and by the reader that calls nothing."
    own = {'train/launch.py': ['pickle.load'], 'train/distributed.py': ['pickle.loads']}
    found = {f: [n for n in unsafe(s) if n.startswith('pickle')] for f, s in SOURCES.items()}
    assert {f: n for f, n in found.items() if n} == own
    bases = [f for f, s in SOURCES.items() if re.search(r'class \w+\(pickle\.Unpickler\)', s)]
    assert bases == ['data/vqa_files.py']


def test_weights_are_read_as_tensors_alone():
    assert sum('torch.load(' in s for s in SOURCES.values()) >= 2
    assert not [f for f, s in SOURCES.items() if 'torch.load' in unsafe(s)]


def test_no_text_is_evaluated():
    shown = {f: [n for n in unsafe(s) if n in ('eval', 'exec', 'os.system', 'os.popen')] for f, s in SOURCES.items()}
    assert not {f: n for f, n in shown.items() if n}
    yaml = {f for f, s in SOURCES.items() if any(n.startswith('yaml.') for n in unsafe(s))}
    assert yaml == {'lab/presets.py'}, 'its loader is a SafeLoader, which the next tests try'


def test_remote_code_is_trusted_nowhere():
    rest = ('pickle.load', 'pickle.loads', 'yaml.load')
    assert sum('trust_remote_code=False' in s for s in SOURCES.values()) >= 8
    assert not {f: n for f, s in SOURCES.items() if (n := unsafe(s, rest))}


@pytest.mark.parametrize('line', ['eval(x)', 'torch.load(f)', 'torch.load(f, weights_only=False)', 'pickle.loads(b)',
                                  'subprocess.run(c, shell=True)', 'np.load(f, allow_pickle=True)',
                                  'AutoModel.from_pretrained(p, trust_remote_code=True)', 'AutoModel.from_pretrained(p)',
                                  'yaml.load(t)'])
def test_an_unsafe_call_is_noticed(line): assert unsafe(line)


# Model folders

EVIL = "from pathlib import Path\nPath({!r}).touch()\nclass Model: ...\n"


def spoil(folder, mark, **change):
    "A model folder that brings code along and asks for it."
    (folder/'evil.py').write_text(EVIL.format(str(mark)))
    names = dict(AutoConfig='evil.Model', AutoModel='evil.Model', AutoProcessor='evil.Model',
                 AutoModelForImageTextToText='evil.Model', AutoTokenizer=['evil.Model', None],
                 AutoImageProcessor='evil.Model', AutoModelForCausalLM='evil.Model')
    for f in ('config.json', 'processor_config.json', 'tokenizer_config.json'):
        d = json.loads((folder/f).read_text())
        (folder/f).write_text(json.dumps(d | dict(auto_map=names) | (change if f == 'config.json' else {})))
    return folder


def base(folder): return shutil.copytree(root()/'data/base_tiny', folder)


def test_no_code_of_a_model_folder_runs(tmp_path, monkeypatch):
    monkeypatch.setenv('HF_HOME', str(tmp_path/'hf'))
    monkeypatch.setattr('builtins.input', lambda *a: 'y')   # whoever is asked says yes
    known = spoil(base(tmp_path/'known'), tmp_path/'ran')
    assert load(known)[0].config.model_type == 'llava'
    stranger = spoil(base(tmp_path/'stranger'), tmp_path/'ran', model_type='stranger')
    with pytest.raises(ValueError): load(stranger)
    assert not (tmp_path/'ran').exists()


class Linear(nn.Module):
    "A connector of one's own."
    def __init__(self, vision_width, text_width, tokens_in):
        super().__init__()
        self.tokens_out, self.linear = tokens_in, nn.Linear(vision_width, text_width)

    def forward(self, features): return self.linear(features)


def test_a_checkpoint_imports_recipes_of_this_library_only(tmp_path, monkeypatch):
    (tmp_path/'evil_connector.py').write_text(EVIL.format(str(tmp_path/'ran')))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(CONNECTORS, 'toy_linear', Linear)
    model, processor = tiny_model(connector='toy_linear')
    connector(model)._record['module'] = 'evil_connector'
    save(model, processor, tmp_path/'m')
    monkeypatch.delitem(CONNECTORS, 'toy_linear')
    with pytest.raises(UnknownName, match='evil_connector'): load(tmp_path/'m')
    assert not (tmp_path/'ran').exists()


@pytest.mark.parametrize('template', ["{{ ''.__class__.__mro__[1].__subclasses__() }}",
                                      "{{ messages.append.__globals__ }}", "{{ cycler.__init__.__globals__.os }}"])
def test_a_chat_template_cannot_reach_python(template):
    tok = AutoTokenizer.from_pretrained(root()/'data/base_tiny')
    turns = [dict(role='user', content='hello')]
    try: said = chat_text(tok, turns, template=template)
    except Exception as e: assert 'unsafe' in str(e) or 'undefined' in str(e), e
    else: assert not said.strip(), 'nothing of it is rendered'


def test_a_preset_is_data(tmp_path, capsys):
    f = tmp_path/'evil.yaml'
    f.write_text(f"description: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{tmp_path}/ran']]\n")
    assert main(['plan', str(f)]) == 2 and not (tmp_path/'ran').exists()
    assert main(['batch', str(f), '--plan']) == 2 and not (tmp_path/'ran').exists()
    assert capsys.readouterr().err.count('\n') == 2


# Pages and uploads

HTML = '"><script>alert(1)</script><img src=x onerror=alert(2)>'


def test_the_report_of_a_grid_escapes_what_it_shows():
    page = html_table([HTML], [[HTML, (HTML, HTML), [(HTML, 'a.html')], 1.5, None]])
    assert '<script' not in page and '<img' not in page and page.count('&lt;script&gt;') == 5
    assert '<a href="&quot;&gt;' in page


@pytest.mark.parametrize('data', [b'', b'no image', b'\x89PNG\r\n\x1a\n' + b'\0'*40, b'GIF89a\xff\xff\xff\xff\0\0\0;'])
def test_an_upload_that_is_a_bomb_or_no_image_is_refused(data):
    box = Chat({'echo': lambda image, turns: iter(['seen'])}, preview=True)
    box.receive(data, '<script>alert(1)</script>.png')
    assert 'role="alert"' in box.note.value and '<script>' not in box.note.value
    assert 'data:image' not in box.view.value
