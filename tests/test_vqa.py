"""The VQA readers on the real sets."""
import json
from collections import Counter

import pytest

from llava_med import vqa
from llava_med.runs import test_data as data_folder

DATA = data_folder()
pytestmark = pytest.mark.skipif(DATA is None or not (DATA / 'slake').is_dir(),
                                reason='no LLAVA_MED_TESTDATA')


@pytest.fixture(scope='module')
def slake(): return {s: vqa.read_slake(DATA / 'slake', s) for s in ('train', 'val', 'test')}


@pytest.fixture(scope='module')
def rad(): return {s: vqa.read_vqa_rad(DATA / 'vqa_rad' / f'{s}set.json')
                   for s in ('train', 'test')}


def test_slake_has_its_published_size(slake):
    assert {s: len(v) for s, v in slake.items()} == {'train': 4919, 'val': 1053, 'test': 1061}
    assert Counter(o['answer_type'] for o in slake['test']) == {'OPEN': 645, 'CLOSED': 416}
    assert vqa.check_items(slake['test'], published=True) == []
    assert vqa.check_items(slake['train'],
                           published=True) == ["Item 'slake-1622' has an empty answer."]
    both = vqa.read_slake(DATA / 'slake', 'test', lang=None)
    assert Counter(o['q_lang'] for o in both) == {'en': 1061, 'zh': 1033}


def test_slake_tags_and_regions(slake):
    kinds = Counter(o['tags']['question_type'] for o in slake['test'])
    assert kinds['organ'] == 253 and kinds['count'] == 52 and kinds['abnormality'] == 150
    assert {o['tags']['modality'] for o in slake['train']} == {'chest_xray', 'ct_scan', 'mri'}
    assert {r['name'] for r in vqa.slake_boxes(DATA / 'slake', 'xmlab1/source.jpg')} == {'liver'}
    box = vqa.slake_boxes(DATA / 'slake', 'xmlab1/source.jpg')[0]['box']
    assert [round(v * 256) for v in box] == [54, 106, 30, 31]
    marked = [o for v in slake.values() for o in v if o['regions']]
    assert len(marked) >= 20
    for o in marked:
        assert all(vqa._named(r['name'], o['question'] + ' ' + o['answer']) for r in o['regions'])


def test_vqa_rad_test_is_179_open_and_272_closed(rad):
    assert {s: len(v) for s, v in rad.items()} == {'train': 3064, 'test': 451}
    assert Counter(o['answer_type'] for o in rad['test']) == {'OPEN': 179, 'CLOSED': 272}
    assert Counter(o['answer_type'] for o in rad['train']) == {'OPEN': 1241, 'CLOSED': 1823}
    for v in rad.values(): assert vqa.check_items(v, published=True) == []


def test_vqa_rad_oddities(rad):
    public = vqa.read_vqa_rad(DATA / 'vqa_rad' / 'VQA_RAD Dataset Public.json')
    assert len(public) == 2248 and public[0]['qid'] == 0
    assert Counter(o['split'] for o in public) == {'train': 1797, 'test': 451}
    for o in public + rad['train']:
        assert isinstance(o['answer'],
                          str) and '\ufffd' not in o['question'] and o['answer_type'] in ('OPEN',
                              'CLOSED')
    assert any("it's the common bile duct" in o['question'] for o in public)
    assert {'atrib', 'prse', 'pres',
            'attrib'}.isdisjoint(o['tags']['question_type'] for o in public)
    raw = json.loads((DATA / 'vqa_rad' / 'testset.json').read_text(encoding='utf-8'))
    assert [o['question'] for o in rad['test']] == [vqa.clean(r['question']) for r in raw]


def test_audit_of_vqa_rad_finds_every_test_image_in_train(rad):
    rows = {r['check']: r for r in vqa.audit_splits(rad['train'], rad['test'])}
    assert (rows['images']['shared'], rows['images']['of']) == (203, 203)
    assert rows['image_and_question']['shared'] > 0


def test_audit_of_slake_finds_no_image_shared(slake):
    rows = {r['check']: r for r in vqa.audit_splits(slake['train'], slake['test'])}
    assert (rows['images']['shared'], rows['images']['of']) == (0, 96)
    chinese = [o for o in vqa.read_slake(DATA / 'slake', 'train', 'zh')]
    assert vqa.audit_splits(chinese, slake['test'])[0]['shared'] == 72


def test_one_door_for_all(tmp_path, slake):
    assert vqa.read_vqa(DATA / 'slake', 'test') == slake['test']
    assert len(vqa.read_vqa(DATA / 'vqa_rad')) == 3515
    assert len(vqa.read_vqa(DATA / 'slake' / 'test.json')) == 1061
    assert len(vqa.read_vqa(DATA / 'pathvqa' / 'lxmert_pvqa_test.json')) == 6761
    assert len(vqa.read_vqa(DATA / 'pathvqa' / 'lxmert_pvqa_val.json')) == 6279
    vqa.write_items(tmp_path / 'a.json', slake['test'])
    assert vqa.read_vqa(tmp_path / 'a.json') == slake['test']
