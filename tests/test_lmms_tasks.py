"The tasks for lmms-eval: files that parse, functions that exist, numbers that are ours, and the tool itself where it is installed."
import importlib
import importlib.util
import json

import pytest
import yaml
from PIL import Image

from llava_med.lab.commands import main
from llava_med.evaluate.lmms_tasks import METRICS, SETS, doc_messages, doc_results, doc_text, doc_visual, lmms_docs, mean_score, write_lmms
from llava_med.data.vqa_readers import read_vqa
from llava_med.core.runs import test_data as data_folder
from llava_med.evaluate.score_rows import score_answers

DATA = data_folder()
real = pytest.mark.skipif(DATA is None or not (DATA/'vqa_rad').is_dir(), reason='no LLAVA_MED_TESTDATA')
tool = pytest.mark.skipif(importlib.util.find_spec('lmms_eval') is None, reason='lmms-eval is not installed')
PLACES = dict(vqa_rad=('vqa_rad/testset.json', 'vqa_rad/images'), slake=('slake', 'slake/imgs'))


def read_task(path):
    "A task file with what it includes, and functions by name."
    class Loader(yaml.SafeLoader): pass
    Loader.add_constructor('!function', lambda loader, node: loader.construct_scalar(node))
    d = yaml.load(path.read_text(), Loader)
    return (yaml.load((path.parent/d.pop('include')).read_text(), Loader) if 'include' in d else {}) | d


def the_function(name):
    module, name = name.rsplit('.', 1)
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize('name', SETS)
def test_task_files_parse_and_name_functions_that_exist(repo, name):
    d = read_task(repo/f'llava_med/evaluate/lmms_eval/llava_med_{name}.yaml')
    assert d['task'] == f'llava_med_{name}' and d['dataset_kwargs']['data_files'] == {'test': f'{name}.parquet'}
    for k in ('doc_to_visual', 'doc_to_text', 'doc_to_messages', 'process_results'): assert callable(the_function(d[k]))
    assert tuple(m['metric'] for m in d['metric_list']) == METRICS and all(the_function(m['aggregation']) is mean_score for m in d['metric_list'])
    assert (d['score_key'], d['cluster_key'], d['generation_kwargs']['do_sample']) == ('score', 'image', False)


@real
@pytest.mark.parametrize('name', PLACES)
def test_real_sets_are_written_and_scored_as_by_us(name, tmp_path, capsys):
    items, images = (DATA/p for p in PLACES[name])
    assert main(['lmms', str(items), '--images', str(images), '--out', str(tmp_path), '--part']) == 0
    import datasets
    task = read_task(tmp_path/f'llava_med_{name}.yaml')
    docs = datasets.load_dataset('parquet', data_files={'test': str(tmp_path/task['dataset_kwargs']['data_files']['test'])}, cache_dir=str(tmp_path/'cache'))['test']
    known = {o['id']: o for o in read_vqa(items, 'test')}
    assert f'{len(docs)} of {len(known)} questions' in capsys.readouterr().out and 50 < len(docs) < len(known)
    assert all((d['question'], d['answer'], d['answer_type']) == (o['question'], str(o['answer']), o['answer_type']) for d in docs for o in [known[d['id']]])
    message = doc_messages(docs[0], dict(post_prompt=' Say it.'))[0]['content']
    assert message[0]['url'].mode == 'RGB' and message[1]['text'] == docs[0]['question'] + ' Say it.'
    said = [('yes', 'no', d['answer'], f'It is {d["answer"]}.', '', 'in the left lung, no')[i % 6] for i, d in enumerate(docs)]
    got = {}
    for d, t in zip(docs.remove_columns('image'), said):
        for m, r in doc_results(d, [t]).items(): got.setdefault(m, []).append(r)
    rows, _ = score_answers([known[d['id']] for d in docs], [dict(item=d['id'], prompt=d['question'], text=t) for d, t in zip(docs, said)], n_draws=5)
    ours = {r['metric']: (r['value'], r['n_items'], r['n_images']) for r in rows if r['slice'] == 'all'}
    assert set(got) == set(METRICS)
    assert {m: (round(mean_score(rs), 4), len(rs), len({r['image'] for r in rs})) for m, rs in got.items()} == {m: ours[m] for m in METRICS}


def layout(folder, n=3, **change):
    "A small set in VQA-RAD's layout, with its pictures."
    rows = [dict(qid=i, image_name=f'{i}.png', question=f'Is it {i}?', answer=('yes', 'no', 3)[i % 3], answer_type='CLOSED ', question_type='PRES', phrase_type='freeform',
                 image_organ='CHEST') | change for i in range(n)]
    (folder/'testset.json').write_text(json.dumps(rows))
    for i in range(n): Image.new('L', (8, 8), 40*i).save(folder/f'{i}.png')


def test_pictures_travel_with_the_task(tmp_path):
    layout(tmp_path)
    write_lmms(tmp_path/'testset.json', tmp_path, tmp_path/'out', part=True, say=lambda s: None)
    import pandas as pd
    d = pd.read_parquet(tmp_path/'out/vqa_rad.parquet')
    assert all(r['bytes'] for r in d.image) and list(d.answer) == ['yes', 'no', '3'] and str(tmp_path) not in str(d.to_dict())
    assert not list((tmp_path/'out').glob('.*'))


def test_bad_input_gets_one_sentence(tmp_path, capsys):
    layout(tmp_path)
    words = ['lmms', str(tmp_path/'testset.json'), '--images', str(tmp_path), '--out', str(tmp_path/'out')]
    assert main(words) == 1 and '--part' in capsys.readouterr().err                                   # 3 of 451 questions
    (tmp_path/'1.png').unlink()
    with pytest.raises(FileNotFoundError, match='1 of 3 pictures are missing .first: 1.png'):
        lmms_docs(read_vqa(tmp_path/'testset.json', 'test', part=True), tmp_path)
    assert main([*words, '--part']) == 0
    assert main(['lmms', str(tmp_path/'testset.json'), '--images', str(tmp_path/'none'), '--out', str(tmp_path/'x'), '--part']) == 1
    assert 'holds no picture of these 3 questions' in (err := capsys.readouterr().err) and err.count('\n') == 1 and not (tmp_path/'x').exists()
    ours = [dict(id='a', images=['0.png'], question='Is it?', answer='yes', answer_type='CLOSED', options=[], tags={}, regions=[], split='test', twin_of=None, source='phantoms')]
    (tmp_path/'items.json').write_text(json.dumps(ours))
    assert main(['lmms', str(tmp_path/'items.json'), '--images', str(tmp_path), '--out', str(tmp_path/'x')]) == 1
    assert 'there are tasks for vqa_rad, slake, pathvqa' in capsys.readouterr().err


def test_answers_that_are_none():
    doc = dict(id='a', question='Is it?', answer='yes', answer_type='CLOSED', options=None, source='vqa_rad', image_name='x')
    assert doc_results(doc, [None])['strict']['score'] == doc_results(doc, [])['strict']['score'] == 0
    assert doc_text(doc) == 'Is it?' and doc_visual(dict(image=Image.new('L', (2, 2))))[0].mode == 'RGB'


@tool
def test_the_published_tool_loads_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv('HF_HOME', str(tmp_path/'hf'))
    monkeypatch.setenv('HF_DATASETS_CACHE', str(tmp_path/'hf/datasets'))
    layout(tmp_path)
    write_lmms(tmp_path/'testset.json', tmp_path, tmp_path/'out', part=True, say=lambda s: None)
    from lmms_eval.tasks import TaskManager, get_task_dict
    manager = TaskManager(include_path=str(tmp_path/'out'), include_defaults=False, model_name='llava_hf')
    assert manager.all_tasks == ['llava_med_vqa_rad']
    task = get_task_dict(manager.all_tasks, manager, 'chat')['llava_med_vqa_rad']
    assert len(task.eval_docs) == 3 and set(task.aggregation()) == set(METRICS)
    doc = task.eval_docs[0]
    assert task.doc_to_messages(doc)[0]['content'][1]['text'] == 'Is it 0?'
    assert task.process_results(doc, ['Yes.'])['strict.closed']['score'] == 1
