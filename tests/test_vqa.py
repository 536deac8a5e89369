"""The VQA readers and the split audit: real sets where they are at hand, and files made here in every layout, whole, odd, cut off and hostile."""
import io
import json
import os
import pickle
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from llava_med.data import leakage, vqa, vqa_files, vqa_readers
from llava_med.lab.commands import main
from llava_med.core.runs import test_data as data_folder, write_json, write_jsonl

DATA = data_folder()
real = pytest.mark.skipif(DATA is None or not (DATA / 'slake').is_dir(), reason='no LLAVA_MED_TESTDATA')
PUBLIC = 'VQA_RAD Dataset Public.json'


@pytest.fixture(scope='module')
def slake(): return {s: vqa.read_slake(DATA / 'slake', s) for s in ('train', 'val', 'test')}


@pytest.fixture(scope='module')
def rad(): return {s: vqa.read_vqa_rad(DATA / 'vqa_rad' / f'{s}set.json') for s in ('train', 'test')}


@pytest.fixture(scope='module')
def public(): return vqa.read_vqa_rad(DATA / 'vqa_rad' / PUBLIC)


def raw(name): return json.loads((DATA / name).read_text(encoding='utf-8'))


def rad_row(n, **kw):
    return dict(qid=n, image_name=f'{n}.jpg', image_organ='HEAD', question=f'Is {n} there?', answer='Yes', answer_type='CLOSED',
                question_type='PRES', phrase_type='freeform') | kw


# SLAKE

@real
def test_slake_has_its_published_size(slake):
    assert {s: len(v) for s, v in slake.items()} == {'train': 4919, 'val': 1053, 'test': 1061}
    assert vqa.item_counts(slake['test']) == (1061, 96, 645, 416)
    assert vqa.check_items(slake['test'], published=True) == []
    both = vqa.read_slake(DATA / 'slake', 'test', lang=None)
    assert Counter(o['q_lang'] for o in both) == {'en': 1061, 'zh': 1033}
    for split in ('train', 'val', 'test'):
        for lang, edition in (('en', 'en'), ('zh', 'zh'), (None, 'en+zh')):
            assert vqa.check_counts(vqa.read_slake(DATA / 'slake', split, lang), edition) == []


@real
def test_slakes_empty_answer_is_reported_and_kept(slake):
    assert vqa.check_items(slake['train'], published=True) == ["Item 'slake-1622' has an empty answer."]


@real
def test_slakes_closed_questions_are_not_all_yes_or_no(slake):
    closed = [o for o in slake['test'] if o['answer_type'] == 'CLOSED']
    assert (len(closed), sum(map(vqa.is_yes_no, closed))) == (416, 355)
    assert not any(vqa.is_yes_no(o) for o in slake['test'] if o['answer_type'] == 'OPEN')


@real
def test_slake_tags_and_regions(slake):
    kinds = Counter(o['tags']['question_type'] for o in slake['test'])
    assert kinds['organ'] == 253 and kinds['count'] == 52 and kinds['abnormality'] == 150
    assert {o['tags']['modality'] for o in slake['train']} == {'chest_xray', 'ct_scan', 'mri'}
    box = vqa.slake_boxes(DATA / 'slake', 'xmlab1/source.jpg')[0]
    assert box['name'] == 'liver' and [round(v * 256) for v in box['box']] == [54, 106, 30, 31]
    marked = [o for v in slake.values() for o in v if o['regions']]
    assert len(marked) >= 20
    for o in marked: assert all(vqa._named(r['name'], o['question'] + ' ' + o['answer']) for r in o['regions'])


@real
def test_slakes_masks_agree_with_its_boxes_in_rgb_and_rgba():
    modes = Counter()
    for folder in sorted((DATA / 'slake/imgs').iterdir()):
        image = f'{folder.name}/source.jpg'
        boxes, masks = (Counter(r['name'] for r in f(DATA / 'slake', image)) for f in (vqa.slake_boxes, vqa.slake_masks))
        if folder.name == 'xmlab391':  # an X-ray with a coloured overlay, 255 grey values, under the name of a mask
            assert not masks and [r['name'] for r in vqa.slake_regions(DATA / 'slake', image)] == ['cardiomegaly']
            continue
        with Image.open(folder / 'mask.png') as img: modes[img.mode] += bool(masks)
        assert set(boxes) == set(masks), folder.name
        for r in vqa.slake_regions(DATA / 'slake', image):
            pixels = vqa.region_mask(DATA / 'slake/imgs', r)
            inside = pixels.sum() / pixels.size
            assert 0 < inside <= r['area'] + 1e-4
            if boxes[r['name']] == 1: assert inside >= .95 * r['area'], (folder.name, r['name'])
    assert modes['RGB'] and modes['RGBA']


@real
def test_slakes_empty_box_lists_give_no_regions():
    assert vqa.slake_boxes(DATA / 'slake', 'xmlab100/source.jpg') == vqa.slake_regions(DATA / 'slake', 'xmlab100/source.jpg') == []


@real
def test_chinese_questions_find_their_regions():
    items = [o for o in vqa.read_slake(DATA / 'slake', 'test', 'zh') if o['images'] == ['xmlab1/source.jpg']]
    where = next(o for o in items if '肝脏' in o['question'])
    assert [r['name'] for r in where['regions']] == ['liver']
    assert next(o for o in items if '脾脏' in o['question'])['regions'] == []


def test_slake_under_its_other_file_name(tmp_path):
    row = dict(qid=1, img_name='a/source.jpg', question='Q?', answer='A', answer_type='OPEN', q_lang='en')
    write_json(tmp_path / 'validation.json', [row])
    assert vqa.read_slake(tmp_path, 'val') == vqa_readers.read_vqa(tmp_path, part=True) and vqa.read_slake(tmp_path, 'val')[0]['split'] == 'val'
    write_json(tmp_path / 'validation.json', [{k: v for k, v in row.items() if k != 'answer_type'}])
    with pytest.raises(ValueError, match="validation.json: row 0 lacks 'answer_type'"): vqa.read_slake(tmp_path, 'val')


# VQA-RAD

@real
def test_vqa_rad_test_is_179_open_and_272_closed(rad, public):
    assert {s: vqa.item_counts(v) for s, v in rad.items()} == {'train': (3064, 314, 1241, 1823), 'test': (451, 203, 179, 272)}
    for v in rad.values(): assert vqa.check_items(v, published=True) == vqa.check_counts(v, 'two files') == []
    assert vqa.check_counts(public, 'public file') == [] and vqa.check_counts(rad['train'], 'public file')
    assert sum(map(vqa.is_yes_no, rad['test'])) == 251


@real
def test_vqa_rad_oddities(rad, public):
    rows = raw(f'vqa_rad/{PUBLIC}')
    assert isinstance(rows[0]['qid'], str) and public[0]['qid'] == 0 and len(public) == 2248
    assert Counter(o['split'] for o in public) == {'train': 1797, 'test': 451}
    ints = [n for n, r in enumerate(rows) if isinstance(r['answer'], int)]
    assert len(ints) == 5 and [public[n]['answer'] for n in ints] == [str(rows[n]['answer']) for n in ints]
    spaced = [n for n, r in enumerate(rows) if r['answer_type'] == 'CLOSED ']
    assert len(spaced) == 2 and {public[n]['answer_type'] for n in spaced} == {'CLOSED'}
    broken = [n for n, r in enumerate(rows) if '\ufffd' in r['question']]
    assert broken and all("it's the common bile duct" in public[n]['question'] for n in broken)
    assert {r['question_type'] for r in rows} >= {'PRSE', 'ATRIB'}
    assert {'atrib', 'prse', 'pres', 'attrib'}.isdisjoint(o['tags']['question_type'] for o in public)
    nulls = [n for n, r in enumerate(rows) if r.get('question_rephrase') == 'NULL' and r['question_frame'] == 'NULL']
    assert nulls and all(public[n]['rephrase'] is None and public[n]['frame'] is None for n in nulls)
    for o in public + rad['train']: assert isinstance(o['answer'], str) and o['answer_type'] in ('OPEN', 'CLOSED') and '\ufffd' not in o['question']
    assert [o['question'] for o in rad['test']] == [vqa.clean(r['question']) for r in raw('vqa_rad/testset.json')]


def test_bad_rows_are_named(tmp_path):
    for wrong, said in ((dict(qid='one'), 'row 1 has the qid'), (None, 'row 1 lacks')):
        write_json(tmp_path / 'testset.json', [rad_row(0), wrong and rad_row(1, **wrong) or dict(qid=1)])
        with pytest.raises(ValueError, match=said): vqa.read_vqa_rad(tmp_path / 'testset.json')


# Published sizes

def test_a_file_that_was_cut_off_is_refused_unless_it_is_said_to_be_a_part(tmp_path):
    write_json(tmp_path / 'testset.json', [rad_row(n) for n in range(9)])
    with pytest.raises(ValueError, match=r'vqa_rad test has 9 questions.*published: 451 questions, 203 images.*part=True'):
        vqa_readers.read_vqa(tmp_path / 'testset.json')
    assert len(vqa_readers.read_vqa(tmp_path / 'testset.json', part=True)) == 9


@real
def test_one_question_less_is_noticed(tmp_path, rad):
    write_json(tmp_path / 'testset.json', raw('vqa_rad/testset.json')[:-1])
    with pytest.raises(ValueError, match='has 450 questions'): vqa_readers.read_vqa(tmp_path / 'testset.json')
    rows = raw('vqa_rad/testset.json'); rows[0]['answer_type'] = 'OPEN'
    write_json(tmp_path / 'testset.json', rows)
    with pytest.raises(ValueError, match='180 open, 271 closed'): vqa_readers.read_vqa(tmp_path / 'testset.json')


def test_score_says_what_it_read_and_takes_part(tmp_path, capsys):
    write_json(tmp_path / 'testset.json', [rad_row(n) for n in range(3)])
    write_jsonl(tmp_path / 'a.jsonl', [dict(question_id=n, prompt=f'Is {n} there?', text='yes') for n in range(3)])
    words = ['score', str(tmp_path / 'testset.json'), str(tmp_path / 'a.jsonl'), '--scorer', 'strict']
    assert main(words) == 1 and '--part' in capsys.readouterr().err
    assert main([*words, '--part']) == 0
    assert 'VQA-RAD in the two files' in capsys.readouterr().out


# PathVQA and its pickles

def row_of(n, answer='yes', kind='yes/no', image='test_0001'):
    return dict(answer_type=kind, img_id=image, label={answer: 1}, question_id=n, question_type='is', sent=f'Is {n} benign?')


def dump(path, obj, protocol=4):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(obj if isinstance(obj, bytes) else pickle.dumps(obj, protocol))
    return path


@real
@pytest.mark.parametrize('split, n, n_rows, images, closed', [('val', 6279, 992, 832, 3135), ('test', 6761, 991, 858, 3391)])
def test_pathvqas_lxmert_files(split, n, n_rows, images, closed):
    path = DATA / f'pathvqa/lxmert_pvqa_{split}.json'
    rows, items = raw(f'pathvqa/lxmert_pvqa_{split}.json'), vqa_readers.read_vqa(path)
    assert len(rows) == n_rows and sum(not r['sentf']['pvqa'] for r in rows) == n_rows - images  # images without questions
    assert vqa.item_counts(items) == (n, images, n - closed, closed) and {o['split'] for o in items} == {split}
    assert {o['type_from'] for o in items} == {'answer'} and len({o['id'] for o in items}) == n
    assert any(o['answer'] != o['answer'].lower() for o in items)  # case stays as it is in the file


def test_pathvqa_copies_in_other_case_are_the_same_question(tmp_path):
    upper, lower = (vqa_files.read_pathvqa(dump(tmp_path / 'test_qa.pkl', [dict(image='test_1', question=q, answer=a)]))
                    for q, a in (('What is shown?', 'Breast Cancer'), ('what is shown ?', 'breast cancer')))
    got = {r['check']: r['shared'] for r in leakage.audit_splits(upper, [dict(o, id='b') for o in lower])}
    assert (got['images'], got['image_and_question']) == (1, 1)


@pytest.mark.parametrize('protocol', range(6))
def test_pathvqas_pickles_of_every_protocol(tmp_path, protocol):
    rows = [row_of(0), row_of(1, 'two', 'number'), row_of(2, 'é', 'other', 'test_0002')]
    items = vqa_files.read_pathvqa(dump(tmp_path / 'pvqa/qas/test_vqa.pkl', rows, protocol))
    assert [(o['answer'], o['answer_type'], o.get('official_type')) for o in items] == [('yes', 'CLOSED', 'yes/no'), ('two', 'OPEN', 'number'), ('é', 'OPEN', 'other')]
    assert [o['images'][0] for o in items] == ['test/test_0001.jpg'] * 2 + ['test/test_0002.jpg'] and items[1]['id'] == 'pathvqa-test_0001-1'
    assert vqa_readers.read_vqa(tmp_path / 'pvqa', part=True) == items


class Call:
    "A value whose pickle calls a function."
    def __init__(self, function, *args): self.call = function, args
    def __reduce__(self): return self.call


def hostile(tmp_path):
    "Pickles that make a folder, or ask for something by name, in every way that the format knows."
    mark = str(tmp_path / 'trapped')
    def row(value): return [row_of(0) | dict(sent=value)]
    yield from (pickle.dumps(row(Call(os.mkdir, mark)), p) for p in range(6))
    yield pickle.dumps(row(Call(eval, f'__import__("os").mkdir({mark!r})')))
    yield pickle.dumps([row_of(0)])[:-1] + b'cos\nmkdir\n(V' + mark.encode() + b'\ntR.'  # after the rows
    yield b"(V" + mark.encode() + b"\nios\nmkdir\n."         # INST
    yield b"(cos\nmkdir\nV" + mark.encode() + b"\no."        # OBJ
    yield b'\x80\x02cos\nmkdir\nV' + mark.encode() + b'\n\x85\x81.'  # NEWOBJ
    yield from (b'Pstranger\n.', b'Vstranger\nQ.', b'\x80\x02\x82\x01.', b'\x80\x05\x97.', b'cbuiltins\neval\n.', b'}}b.')


def test_a_hostile_pickle_is_refused_and_does_nothing(tmp_path):
    files = list(hostile(tmp_path))
    pickle.loads(files[4]); os.rmdir(tmp_path / 'trapped')  # the trap works where nobody is careful
    for n, data in enumerate(files):
        with pytest.raises(ValueError, match='refused'): vqa_files.plain_pickle(dump(tmp_path / f'{n}.pkl', data))
        with pytest.raises(ValueError, match='refused'): vqa_readers.read_vqa(tmp_path / f'{n}.pkl')
        assert not (tmp_path / 'trapped').exists()
    import copyreg  # a name that the process has registered is not looked up, so the list of instructions has to stop it
    copyreg.add_extension('os', 'mkdir', 241)
    try:
        with pytest.raises(ValueError, match='EXT1'): vqa_files.plain_pickle(dump(tmp_path / 'e.pkl', b'\x80\x02\x82\xf1V' + str(tmp_path / 'trapped').encode() + b'\n\x85R.'))
    finally: copyreg.remove_extension('os', 'mkdir', 241)
    assert not (tmp_path / 'trapped').exists()


def test_the_second_lock_holds_alone():
    for data in (pickle.dumps(Call(os.getpid)), b'cos\nmkdir\n.'):
        with pytest.raises(pickle.UnpicklingError, match='asks for'): vqa_files._PlainUnpickler(io.BytesIO(data)).load()


@pytest.mark.parametrize('data, said', [(b'', 'not a pickle'), (b'{"a": 1}', 'not a pickle'), (pickle.dumps([row_of(0)])[:40], 'not a pickle'),
                                        (b'\x80\x04]r\xff\xff\xff\x7f.', 'reserves room'), (b']p4294967290\n.', 'reserves room')])
def test_broken_pickles(tmp_path, data, said):
    with pytest.raises(ValueError, match=said): vqa_files.plain_pickle(dump(tmp_path / 'x.pkl', data))


def test_other_pickles_of_pathvqa_are_left_aside(tmp_path):
    dump(tmp_path / 'qas/test_vqa.pkl', [row_of(0)]); dump(tmp_path / 'qas/ans2label.pkl', {'yes': 0}); dump(tmp_path / 'qas/q2a.pkl', ['a', 'b'])
    assert len(vqa_readers.read_vqa(tmp_path, part=True)) == 1
    with pytest.raises(ValueError, match='none of the known forms'): vqa_readers.read_vqa(tmp_path / 'qas/ans2label.pkl')


# PMC-VQA

def test_pmc_vqa_with_letters_that_contradict_the_text(tmp_path):
    head = 'Figure_path,Question,Answer,Choice A,Choice B,Choice C,Choice D,Answer_label\n'
    good, other, beyond = ('PMC1_F1.jpg,Q?, B: two ,A: one ,B: two,C:three,D:four,B\n', 'PMC2_F1.jpg,"Q, again?",two,A:one,B:two,C:three,D:four,A\n',
                           'PMC3_F1.jpg,Q?,E,A:one,B:two,C:three,D:four,E\n')
    (tmp_path / 'train.csv').write_text(head + good + other + beyond)
    with pytest.raises(ValueError, match=r"train.csv: row 1 has the keys 'two' .* and 'A' .*different options.*first of 2 such records"): vqa_readers.read_vqa(tmp_path / 'train.csv')
    left, said = [], []
    first, = vqa_readers.read_vqa(tmp_path / 'train.csv', left_out=left, say=said.append)
    assert first['options'] == ['one', 'two', 'three', 'four'] and (first['answer'], first['label'], first['article']) == ('two', 'B', 'PMC1')
    assert len(left) == 2 and 'options are A to D' in left[1] and '2 left out' in said[0]


def test_pmc_vqas_two_versions_are_not_mixed(tmp_path):
    (tmp_path / 'train.csv').write_text('Figure_path,Question,Answer,Choice A,Choice B,Choice C,Choice D,Answer_label\nPMC1.jpg,Q?,x,A:x,B:y,C:z,D:w,A\n')
    (tmp_path / 'test_2.csv').write_text('index,Figure_path,Caption,Question,Choice A,Choice B,Choice C,Choice D,Answer,split\n0,PMC2.jpg,c,Q?,A:x,B:y,C:z,D:w,D,test\n')
    assert vqa_readers.read_vqa(tmp_path / 'test_2.csv')[0]['answer'] == 'w'
    with pytest.raises(ValueError, match='name one of the files'): vqa_readers.read_vqa(tmp_path)
    (tmp_path / 'test_clean.csv').write_text((tmp_path / 'train.csv').read_text())
    with pytest.raises(ValueError, match='2,000 questions'): vqa_readers.read_vqa(tmp_path / 'test_clean.csv')


# LLaVA-Med's form

def test_llava_meds_converted_set(tmp_path):
    def row(n, key='conversations', image='a.jpg', text='Is it?', kind='CLOSED'):
        return {'id': n, 'image': image, 'answer_type': kind, key: [{'from': 'human', 'value': text}, {'from': 'gpt', 'value': 'Yes '}]}
    rows = [row(0, text='<image>\nIs it?'), row(1, 'conversatons', ['a.jpg', 'b.jpg']), row(2, text='Is it? Please choose from the following two options: [No, yes]'), row(3, kind='yes/no')]
    write_json(tmp_path / 'test.json', rows)
    items = vqa_readers.read_vqa(tmp_path)
    assert [o['question'] for o in items] == ['Is it?'] * 4 and items[1]['images'] == ['a.jpg', 'b.jpg'] and {o['split'] for o in items} == {'test'}
    assert items[2]['options'] == ['No', 'yes'] and items[2]['prompt'].endswith('[No, yes]') and {o['answer'] for o in items} == {'Yes'}
    assert (items[3]['answer_type'], items[3]['official_type']) == ('CLOSED', 'yes/no') and vqa.check_items(items) == []
    write_jsonl(tmp_path / 'lines.json', rows)
    assert [o['question'] for o in vqa_readers.read_vqa(tmp_path / 'lines.json')] == ['Is it?'] * 4


# a table of one's own

def test_a_spreadsheet_is_a_set_with_splits_and_pictures(tmp_path):
    (tmp_path / 'images').mkdir(); Image.new('RGB', (8, 8)).save(tmp_path / 'images/a.png')
    rows = ['split,image,question,answer,organ', 'training,a.png,"Round, or square?",round,Lung', 'test,a.png,Is it large?,No,', 'test,b.png,Is it large?,Yes,']
    (tmp_path / 'questions.csv').write_bytes('\r\n'.join(rows).encode('utf-8-sig'))
    found = vqa_readers.open_vqa(tmp_path)
    assert [o['answer_type'] for o in found['test']] == ['CLOSED'] * 2 and found['train'][0]['question'] == 'Round, or square?'
    assert found['train'][0]['tags']['organ'] == 'lung' and found['missing'] == ['b.png'] and len(found['items']) == 1 and vqa.check_items(found['test']) == []
    assert vqa_readers.read_vqa(tmp_path / 'questions.csv', 'train') == found['train']


@pytest.mark.parametrize('name, head', [('x.csv', 'image\tquestion\tanswer\na.png\tq?\tyes'), ('test.csv', 'image;question;answer\na.png;q, r?;yes')])
def test_tables_parted_by_other_marks(tmp_path, name, head):
    (tmp_path / name).write_text(head)
    assert [(o['answer'], o['split']) for o in vqa_readers.read_vqa(tmp_path)] == [('yes', 'test' if name == 'test.csv' else 'all')]


@real
def test_instruction_data_is_not_a_test_set():
    with pytest.raises(ValueError, match='instruction data'): vqa_readers.read_vqa(DATA / 'llava_med/instruct_examples_5.json')


@real
def test_llava_meds_answers_align_with_a_converted_set(tmp_path, rad, capsys):
    rows = [{'id': o['row'], 'image': o['images'][0], 'answer_type': o['answer_type'], 'conversations': [
        {'from': 'human', 'value': o['question'] + '\n<image>'}, {'from': 'gpt', 'value': o['answer']}]} for o in rad['test']]
    write_json(tmp_path / 'test.json', rows)
    assert main(['score', str(tmp_path / 'test.json'), str(DATA / 'llava_med/v1_vqarad_answer-file.jsonl'), '--scorer', 'llavamed_v1']) == 0
    said = capsys.readouterr().out
    assert "LLaVA-Med's converted form" in said and '17.53' in said


# Parquet

def picture(seed, size=24, fmt='PNG'):
    f = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size, size, 3), np.uint8)).save(f, fmt)
    return f.getvalue()


def parquet(path, rows):
    import pyarrow as pa, pyarrow.parquet as pq
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
    return path


def hub_row(n, seed=0, **kw): return dict(image=dict(bytes=picture(seed), path=None), question=f'Is {n} there?', answer='yes') | kw


@pytest.mark.parametrize('name, source, split', [
    ('datasets--flaviagiammarino--vqa-rad/snapshots/1a2b/data/test-00000-of-00001-e5bc3d208bb4deeb.parquet', 'vqa_rad', 'test'),
    ('path-vqa/data/validation-00000-of-00003.parquet', 'pathvqa', 'val'), ('radiology/SLAKE-vqa-english/default/train/0000.parquet', 'slake', 'train'),
    ('mine/0001.parquet', 'parquet', 'all')])
def test_hub_layouts(tmp_path, name, source, split):
    parquet(tmp_path / name, [hub_row(n, n // 3) for n in range(7)])
    for place in (tmp_path / name, tmp_path / name.split('/')[0]):
        said = []
        items = vqa_readers.read_vqa(place, part=True, images_dir=tmp_path / 'out', say=said.append)
        assert {(o['source'], o['split'], o['answer_type'], o['type_from']) for o in items} == {(source, split, 'CLOSED', 'answer')}
        assert len({o['id'] for o in items}) == 7 and f'taken for {source}' in said[0] and 'no official answer type' in said[0]
        assert vqa.check_items(items, tmp_path / 'out') == []
    assert len(list((tmp_path / 'out').iterdir())) == 3 and (tmp_path / 'out' / items[0]['images'][0]).read_bytes() == picture(0)
    if source != 'parquet':
        with pytest.raises(ValueError, match='published'): vqa_readers.read_vqa(tmp_path / name)


def test_files_made_by_datasets_itself(tmp_path):
    datasets = pytest.importorskip('datasets')
    rows = dict(image=[dict(bytes=picture(n), path=f'{n}.png') for n in range(3)], question=['Q?'] * 3, answer=['a', 'no', 'b'], options=[['a', 'c'], [], ['b']])
    features = datasets.Features(image=datasets.Image(), question=datasets.Value('string'), answer=datasets.Value('string'), options=datasets.Sequence(datasets.Value('string')))
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / 'test-00000-of-00001.parquet')
    items = vqa_readers.read_vqa(tmp_path, source='own')
    assert [o['options'] for o in items] == [['a', 'c'], [], ['b']] and [o['answer_type'] for o in items] == ['CLOSED'] * 3   # one of some options, or no
    assert {o['source'] for o in items} == {'own'} and len({o['images'][0] for o in items}) == 3


def test_shards_of_one_split_are_read_together_and_the_same_twice_is_refused(tmp_path):
    for n in range(2): parquet(tmp_path / f'own/data/train-{n:05}-of-00002.parquet', [hub_row(n)])
    assert len(vqa_readers.read_vqa(tmp_path / 'own')) == 2
    for n in ('a', 'b'): write_json(tmp_path / f'rad/test {n}.json', [rad_row(1)])
    with pytest.raises(ValueError, match='several files for the split test'): vqa_readers.read_vqa(tmp_path / 'rad', part=True)


@pytest.mark.parametrize('rows, said', [([dict(text='a')], 'columns text'), ([hub_row(0, image=dict(bytes=b'no image', path=None))], 'image of row 0 cannot be read')])
def test_bad_parquet(tmp_path, rows, said):
    with pytest.raises(ValueError, match=said): vqa_readers.read_vqa(parquet(tmp_path / 'x.parquet', rows))


def test_cut_parquet_and_missing_pictures(tmp_path):
    whole = parquet(tmp_path / 'x.parquet', [hub_row(0)]).read_bytes()
    (tmp_path / 'cut.parquet').write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ValueError, match='cut.parquet: not a parquet file'): vqa_readers.read_vqa(tmp_path / 'cut.parquet')
    items = vqa_readers.read_vqa(parquet(tmp_path / 'none.parquet', [hub_row(0, image=None), hub_row(1)]))
    assert vqa.check_items(items) == [f'Item {items[0]["id"]!r} has an empty images.']


@real
def test_official_types_come_back_from_the_original_file(tmp_path, rad):
    rows = [dict(image='x.jpg', question=o['question'].upper(), answer=o['answer'] + ' ') for o in rad['test']]
    bare = vqa_readers.read_vqa(parquet(tmp_path / 'vqa-rad/test.parquet', rows), part=True)
    assert vqa.item_counts(bare)[2:] == (200, 251)
    items, left = vqa_files.official_types(bare, rad['test'])
    assert (vqa.item_counts(items)[2:], left) == ((179, 272), 0) and [o['answer_type'] for o in items] == [o['answer_type'] for o in rad['test']]
    unsure = [dict(rad['test'][0], answer_type=k) for k in ('OPEN', 'CLOSED')]
    assert vqa_files.official_types(bare[:1], unsure)[1] == 1


# One door

@real
def test_one_door_for_all(tmp_path, slake):
    assert vqa_readers.read_vqa(DATA / 'slake', 'test') == slake['test'] == vqa_readers.read_vqa(DATA / 'slake' / 'test.json')
    said = []
    assert len(vqa_readers.read_vqa(DATA / 'vqa_rad', say=said.append)) == 3515 and 'left aside: VQA-RAD\'s public file' in said[0]
    assert len(vqa_readers.read_vqa(DATA / 'vqa_rad' / PUBLIC)) == 2248 and len(vqa_readers.read_vqa(DATA / 'slake', lang=None)) == 14028
    vqa.write_items(tmp_path / 'a.json', slake['test'][:5])
    assert vqa_readers.read_vqa(tmp_path / 'a.json') == slake['test'][:5]  # our own files may be parts


@pytest.mark.parametrize('name, text, said', [('x.json', '[]', 'none of the known forms'), ('x.json', '{"a": ', 'neither JSON'), ('x.json', '[1, 2]', 'none of the known'),
                                              ('x.csv', 'a,b\n1,2\n', 'none of the known'), ('x.jsonl', '{"a": 1}\n', 'none of the known')])
def test_what_is_no_vqa_set(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=said): vqa_readers.read_vqa(tmp_path / name)
    with pytest.raises(ValueError, match=said): vqa_readers.read_vqa(tmp_path)


def test_missing_things():
    with pytest.raises(FileNotFoundError, match='no such file or folder'): vqa_readers.read_vqa('nowhere')


# The audit

def item(n, image, question='Is it big?', answer='no', **kw): return vqa.make_item(f'i{n}', [image], question, answer, 'CLOSED', 'x', 'toy', **kw)


def shared(rows): return {r['check']: r['shared'] for r in rows}


@real
def test_audit_of_vqa_rad_finds_images_and_rephrasings_and_counts_them(rad, public):
    train, test = (leakage.with_records(rad[s], public) for s in ('train', 'test'))
    rows = leakage.audit_splits(train, test, DATA / 'vqa_rad/images')
    got = shared(rows)
    assert (got['images'], got['cases'], got['image_and_question'], got['official_rephrasings']) == (203, 203, 16, 275)
    by = {r['check']: r for r in rows}
    assert (by['pictures']['shared'], by['pictures']['of']) == (31, 31) and '172 of 203 test and' in by['pictures']['note']
    pairs, _, _ = leakage.overlaps(train, test)
    known, found, same = ({a for a, _ in pairs[k]} for k in ('official_rephrasings', 'rephrased', 'image_and_question'))
    assert len(found) == got['rephrased'] and len(known & found) / len(known - same) > .8
    # counted again: of which test questions are the frame, the rephrasing or a row linked to it training questions on that image
    asked, links = {(o['images'][0], vqa.same_question(o['question'])) for o in rad['train']}, {}
    for o in public: links.setdefault(o['link'], set()).add(vqa.same_question(o['question']))
    n = 0
    for o in test:
        texts = {vqa.same_question(o.get(k) or '') for k in ('frame', 'rephrase')} | links.get(o.get('link'), set())
        n += any((o['images'][0], q) in asked for q in texts - {vqa.same_question(o['question'])})
    assert n == 275


@real
def test_the_rule_for_rephrasings_is_as_good_as_the_chapter_says(public):
    import itertools
    groups, wording, hit, real_, both = {}, leakage.Wording(public), 0, 0, 0
    for o in public: groups.setdefault(o['images'][0], []).append(o)
    for n, name in enumerate(sorted(groups)):
        if n % 2 == 0: continue
        for a, b in itertools.combinations(groups[name], 2):
            texts = [vqa.same_question(o.get('rephrase') or '') for o in (a, b)]
            truth = a['link'] == b['link'] or vqa.same_question(a['question']) == texts[1] or vqa.same_question(b['question']) == texts[0]
            said = wording.score(a, b) >= leakage.REPHRASED
            hit += said; real_ += truth; both += said and truth
    assert both / hit > .93 and both / real_ > .66 and real_ == 417


@real
def test_audit_of_slake_and_pathvqa(slake):
    got = shared(leakage.audit_splits(slake['train'], slake['test'], DATA / 'slake/imgs'))
    assert (got['images'], got['image_and_question'], got['rephrased']) == (0, 0, 0)
    chinese = vqa.read_slake(DATA / 'slake', 'train', 'zh')
    by = {r['check']: r for r in leakage.audit_splits(chinese, slake['test'])}
    assert (by['images']['shared'], by['images']['of']) == (72, 96)
    path = {s: vqa_readers.read_vqa(DATA / f'pathvqa/lxmert_pvqa_{s}.json') for s in ('val', 'test')}
    assert shared(leakage.audit_splits(path['val'], path['test']))['images'] == 0


def save(path, img, **kw): path.parent.mkdir(parents=True, exist_ok=True); img.save(path, **kw)


@real
def test_real_pictures_under_other_names(tmp_path):
    names = sorted(p.name for p in (DATA / 'vqa_rad/images').iterdir())
    for k, n in enumerate(names[:20]):
        img = Image.open(DATA / 'vqa_rad/images' / n).convert('RGB')
        if k % 3 == 0: save(tmp_path / f'{k}.png', img)                      # the same pixels in another file
        elif k % 3 == 1: save(tmp_path / f'{k}.jpg', img, quality=60)        # stored again
        else: save(tmp_path / f'{k}.png', img.resize((img.width * 2 // 3, img.height * 2 // 3)))
    theirs = leakage.image_fingerprints(names, DATA / 'vqa_rad/images')
    pairs = leakage.near_images(leakage.image_fingerprints([p.name for p in tmp_path.iterdir()], tmp_path), theirs)
    assert {(a, b) for a, b, _ in pairs} == {(f'{k}.{"jpg" if k % 3 == 1 else "png"}', names[k]) for k in range(20)}
    assert {a for a, _, equal in pairs if equal} == {f'{k}.png' for k in range(0, 20, 3)}
    assert {(a, b) for a, b, _ in leakage.near_images(theirs, theirs)} == {(n, n) for n in names}


def test_pictures_count_under_any_name_and_ids_count(tmp_path):
    img = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).resize((128, 128))
    save(tmp_path / 'a.png', img); save(tmp_path / 'b.png', img); save(tmp_path / 'c.jpg', img, quality=90); save(tmp_path / 'd.png', img.rotate(90))
    train = [item(0, 'a.png', 'Where is the lesion located?', 'lobe', patient='p', article='PMC1', case='k'), item(1, 'd.png'), item(5, 'a.png')]
    test = [item(2, 'b.png', 'What is the location of the lesion?', 'lobe', patient='q', article='PMC1', case='k'), item(3, 'c.jpg'), item(4, 'e.png', patient='p')]
    rows = leakage.audit_splits(train, test, tmp_path)
    assert shared(rows) == dict(images=0, pictures=1, near_pictures=1, patients=1, cases=1, articles=1, questions=2, image_and_question=1, rephrased=1, official_rephrasings=None)
    assert {r['check']: r['of'] for r in rows}['pictures'] == 2 and '1 of 3 test' in {r['check']: r['note'] for r in rows}['pictures']
    assert shared(leakage.audit_splits(train, test))['pictures'] is None
    table = leakage.audit_table(rows)
    assert list(table.index) == list(leakage.CHECKS) and table.loc['near_pictures', 'shared'] == '1' and table.loc['official_rephrasings', 'of'] == '–'


def test_comparing_thousands_of_pictures_takes_seconds():
    import time
    rng = np.random.default_rng(0)
    many = {n: (bytes([n % 256, n // 256]), rng.integers(0, 256, 32, np.uint8), np.zeros((48, 48), np.int16)) for n in range(3000)}
    start = time.perf_counter()
    assert len(leakage.near_images(many, many)) == 3000
    assert time.perf_counter() - start < 15


def test_flat_pictures_are_not_all_the_same(tmp_path):
    for v in (0, 128): save(tmp_path / f'{v}.png', Image.new('RGB', (32, 32), (v,) * 3))
    marks = leakage.image_fingerprints(['0.png', '128.png'], tmp_path)
    assert {(a, b) for a, b, _ in leakage.near_images(marks, marks)} == {('0.png', '0.png'), ('128.png', '128.png')}


def test_left_is_not_right_and_yes_is_not_no():
    items = [item(0, 'a', 'Is the left lung clear?', 'yes'), item(1, 'a', 'Is the right lung clear?', 'yes'), item(2, 'a', 'Is the left lung clear?', 'no'),
             item(3, 'a', 'Are the left lungs clear?', 'yes'), item(4, 'a', 'Is the lung clear?', 'yes')]
    wording = leakage.Wording(items)
    assert [wording.score(items[0], o) > 0 for o in items[1:]] == [False, False, True, True]


@pytest.mark.parametrize('odd, said', [(dict(answer=['liver', 'spleen']), 'row 1 has the answer'), (dict(answer=dict(text='liver')), 'row 1 has the answer'),
                                       (dict(question=['Which?', 'Where?']), 'row 1 has the question'), (dict(split='holdout'), "row 1 has the split 'holdout'")])
def test_keys_and_splits_that_cannot_be_read_are_refused(tmp_path, odd, said):
    import pyarrow as pa
    import pyarrow.parquet as pq
    from llava_med.data.vqa_readers import read_vqa
    rows = [dict(image=f'{i}.png', question='Which?', answer=['liver'] if i < 1 and isinstance(odd.get('answer'), list) else 'liver') for i in range(2)]
    rows[1] |= odd
    write_json(tmp_path/'a.json', rows)
    (tmp_path/'x').mkdir()
    pq.write_table(pa.Table.from_pylist([rows[1], rows[1]]), tmp_path/'x/b.parquet')
    with pytest.raises(ValueError, match=f'a.json: {said}.*; write'): read_vqa(tmp_path/'a.json')
    with pytest.raises(ValueError, match=f'b.parquet: {said.replace("1", "0")}.*; write'): read_vqa(tmp_path/'x/b.parquet')


# Items by hand

@pytest.mark.parametrize('odd, said', [
    (dict(question=3), "Item 'i0' has the question '3'; write a text"), (dict(question=' '), "Item 'i0' has an empty question"), (dict(tags=['ct']), "Item 'i0' has the tags"),
    (dict(images='a.jpg'), "Item 'i0' has the images 'a.jpg'; write a list of file names"), (dict(images=[None]), "Item 'i0' has the image 'None'"), (dict(answer=True), "Item 'i0' has the answer 'True'"),
    (dict(answer=['no']), "has the answer"), (dict(regions='left'), 'has the regions'), (dict(regions=[{'name': 'a'}]), 'has the region'), (dict(regions=[{'box': [0, 0, 1]}]), 'has the region'),
    (dict(answer_type='maybe'), 'write OPEN or CLOSED'), (dict(id=['x']), 'Item in row 0 has the id'), (dict(split=None), 'has the split'), (dict(options=7), 'has the options')])
def test_an_item_by_hand_is_refused_with_its_name_and_its_field(tmp_path, odd, said):
    write_json(tmp_path/'test.json', [item(0, 'a.png') | odd, item(1, 'b.png')])
    with pytest.raises(ValueError) as e: vqa.read_items(tmp_path/'test.json')
    assert said in str(e.value) and 'test.json' in str(e.value) and '\n' not in str(e.value)


def test_null_is_empty_and_a_number_is_an_answer(tmp_path):
    write_json(tmp_path/'test.json', [item(0, 'a.png') | dict(regions=None, tags=None, options=None, answer=3, answer_type='closed')])
    got = vqa.read_items(tmp_path/'test.json')[0]
    assert (got['regions'], got['tags'], got['options'], got['answer'], got['answer_type']) == ([], {}, [], '3', 'CLOSED')


def test_what_is_not_asked_is_said(tmp_path):
    said, rows = [], [item(0, 'a.png'), item(1, 'gone.png'), item(2, 'b.png') | dict(images=[]), item(3, 'a.png') | dict(answer='')]
    for o in rows: o['split'] = 'test'
    (tmp_path/'a.png').write_bytes(b'x')
    write_json(tmp_path/'test.json', rows)
    found = vqa_readers.open_vqa(tmp_path/'test.json', part=True, say=said.append)
    words = ' '.join(said)
    assert [o['id'] for o in found['items']] == ['i0', 'i3'] and 'the first that is not: gone.png' in words
    assert '1 questions name no image and are not asked (the first: i2)' in words and '1 with an empty answer (the first: i3)' in words


def test_a_question_of_no_split_among_others_is_refused(tmp_path):
    (tmp_path/'x.csv').write_text('image,question,answer,split\na.png,Big?,no,test\na.png,Wide?,no,\n')
    (tmp_path/'a.png').write_bytes(b'x')
    with pytest.raises(ValueError, match="x.csv: 1 of its 2 questions are of no split \\(the first: 'table-1'\\)"): vqa_readers.open_vqa(tmp_path/'x.csv')


def test_other_languages_that_are_left_aside_are_counted(tmp_path):
    rows = [dict(qid=i, img_name='a.png', question='Big?', answer='no', answer_type='CLOSED', q_lang=k) for i, k in enumerate(['en', 'zh', 'zh', 'x'])]
    write_json(tmp_path/'test.json', rows)
    said = []
    assert len(vqa_readers.read_vqa(tmp_path/'test.json', part=True, say=said.append)) == 1 and "other languages left aside: 2 × 'zh', 1 × 'x'" in said[0]


def test_images_of_questions_are_found_under_decomposed_names(tmp_path):
    from unicodedata import normalize
    there = normalize('NFD', 'ü.png')
    (tmp_path/'images').mkdir(); (tmp_path/'images'/there).write_bytes(b'x')
    write_json(tmp_path/'test.json', [item(0, 'ü.png'), item(1, 'images\\ü.png')])
    found = vqa_readers.open_vqa(tmp_path/'test.json', part=True)
    assert {(found['images_dir']/n).is_file() for o in found['items'] for n in o['images']} == {True} and not vqa.check_items(found['items'], found['images_dir'])
