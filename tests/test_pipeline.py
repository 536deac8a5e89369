"The whole pipeline on the smoke preset, through the command that people use."
import csv
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest

from llava_med.core.runs import test_data as data_folder
from llava_med.lab.runner import started

REPO = Path(__file__).resolve().parents[1]
STEPS = ['1_data_prep', '2_stage1_alignment', '3_stage2_tuning', '4_evaluation', '5_attention']
LEDGER = {'wall_s', 'device', 'device_s', 'peak_memory_mib', 'trainable_params', 'samples', 'tokens', 'tokens_per_s', 'model_flops'}
SCORES = 'model,dataset,split,condition,slice,metric,value,low,high,n_items,n_images,n_clusters'.split(',')


def command(outputs, *words):
    "Run `llava-med` and return the finished process and its seconds."
    env = {**os.environ, 'LLAVA_MED_ROOT': str(REPO), 'LLAVA_MED_OUTPUTS': str(outputs), 'PYTHONPATH': str(REPO)}
    env.pop('LLAVA_MED_RUNNER', None)
    code = 'import sys; from llava_med.lab.commands import main; sys.exit(main())'
    began = time.time()
    done = subprocess.run([sys.executable, '-c', code, *words], env=env, capture_output=True, text=True)
    return done, time.time() - began


@pytest.fixture(scope='module')
def outputs(tmp_path_factory): return tmp_path_factory.mktemp('outputs')


@pytest.fixture(scope='module')
def smoke(outputs):
    "The run folder of one smoke run."
    done, took = command(outputs, 'run', 'smoke')
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return {'folder': outputs/'smoke', 'stdout': done.stdout, 'took': took}


def rows(path):
    with open(path, newline='') as f: return list(csv.DictReader(f))


def test_smoke_ends_with_the_table(smoke):
    assert 'strict accuracy' in smoke['stdout'] and 'stage2' in smoke['stdout']
    assert '5 steps run, 0 kept' in smoke['stdout']


@pytest.mark.parametrize('step', STEPS)
def test_step_leaves_what_it_promises(smoke, step):
    folder = smoke['folder']/step
    nb = nbformat.read(folder/f'{step}.ipynb', 4)
    assert not [o for c in nb.cells for o in c.get('outputs', []) if o.output_type == 'error']
    ledger = json.loads((folder/'ledger.json').read_text())
    assert LEDGER <= set(ledger) and ledger['wall_s'] > 0
    assert ledger['peak_memory_mib'] < 4096
    wanted = {'1_data_prep': 'figures.jsonl alignment.json instruct.json vqa/train.json vqa/val.json vqa/test.json images filters.csv dropped.jsonl',
              '2_stage1_alignment': 'model/config.json model/model.safetensors losses.csv',
              '3_stage2_tuning': 'model/config.json model/model.safetensors losses.csv',
              '4_evaluation': 'predictions.jsonl scores.csv report.html calibration.jsonl cards/3_stage2_tuning/model/README.md', '5_attention': 'maps.npz pointing.csv faithfulness.csv explorer.html one_question.svg'}[step]
    assert not [w for w in wanted.split() if not (folder/w).exists()]
    assert not list(folder.glob('*.partial-*')) and not list(folder.rglob('*.tmp'))


def test_record(smoke):
    record = json.loads((smoke['folder']/'run.json').read_text())
    assert record['preset'] == 'smoke' and record['seed'] == 0 and record['versions']['torch'] and record['machine']['cores']
    assert {s: r['state'] for s, r in record['steps'].items()} == dict.fromkeys(STEPS, 'done')
    assert all(r['key'] and r['parameters'] for r in record['steps'].values())
    assert record['hashes']


def test_contract_of_the_data(smoke):
    d = smoke['folder']/'1_data_prep'
    assert list(rows(d/'filters.csv')[0])[:3] == ['filter', 'kept', 'dropped']
    for name in ('alignment', 'instruct'):
        records = json.loads((d/f'{name}.json').read_text())
        assert records and all({'id', 'image', 'conversations'} <= set(r) for r in records)
        assert all((d/'images'/r['image']).is_file() for r in records)
        assert all(t['from'] in ('human', 'gpt') for r in records for t in r['conversations'])
    items = {s: json.loads((d/f'vqa/{s}.json').read_text()) for s in ('train', 'val', 'test')}
    wanted = {'id', 'images', 'question', 'answer', 'answer_type', 'options', 'tags', 'split', 'regions', 'twin_of', 'source'}
    assert all(wanted <= set(i) for part in items.values() for i in part)
    images = {s: {x for i in part for x in i['images']} for s, part in items.items()}
    assert not images['train'] & images['test'] and not images['val'] & images['test']
    figure = json.loads((d/'figures.jsonl').read_text().splitlines()[0])
    assert {'pmcid', 'fig_id', 'caption', 'mentions', 'image', 'modalities', 'licence', 'source'} <= set(figure)


def test_contract_of_the_losses(smoke):
    for step in STEPS[1:3]: assert list(rows(smoke['folder']/step/'losses.csv')[0]) == ['step', 'epoch', 'samples', 'loss', 'lr']


def test_contract_of_the_scores(smoke):
    table = rows(smoke['folder']/'4_evaluation/scores.csv')
    assert list(table[0]) == SCORES
    assert {'base', 'stage1', 'stage2', 'stage2-base'} <= {r['model'] for r in table}
    assert {'image', 'blank', 'shuffled', 'image-blank'} <= {r['condition'] for r in table}
    assert {'strict', 'strict_pairs', 'finding_recall'} <= {r['metric'] for r in table}  # precision needs a model that claims something
    slices = {r['slice'].split('=')[0] for r in table}
    assert {'all', 'question_type', 'modality', 'answer_type', 'combination'} <= slices
    for r in table:
        if r['metric'] == 'strict' and '-' not in r['condition'] + r['model'] and r['value']:
            assert 0 <= float(r['value']) <= 1 and int(r['n_images']) > 0
            if r['n_clusters'] == '1': assert r['low'] == r['high'] == ''   # one image has no interval
            else: assert 0 <= float(r['low']) <= float(r['value']) <= float(r['high']) <= 1 and r['low'] != r['high']
    line = json.loads((smoke['folder']/'4_evaluation/predictions.jsonl').read_text().splitlines()[0])
    assert {'model', 'condition', 'item', 'prompt', 'text', 'error'} <= set(line)


def test_every_control_is_there(smoke):
    table = rows(smoke['folder']/'4_evaluation/scores.csv')
    keys = [tuple(r[k] for k in SCORES[:6]) for r in table]
    assert len(set(keys)) == len(keys)
    assert {'always_yes_no', 'echo', 'prior_majority', 'prior_question_type', 'prior_question'} <= {r['model'] for r in table}
    assert {'noise', 'image-noise', 'image-shuffled'} <= {r['condition'] for r in table}
    assert {'llavamed_v1.open_recall', 'llavamed_v1.open_words', 'medevalkit.closed', 'lmms_slake.accuracy', 'strict.closed', 'answers.error',
            'paired.strict.p_holm', 'paired.strict.mde', 'calibration.ece'} <= {r['metric'] for r in table}
    assert 'organ=lung' in {r['slice'] for r in table}


def test_the_report_stands_alone(smoke):
    report = smoke['folder']/'4_evaluation/report.html'
    html = report.read_text(encoding='utf-8')
    assert report.stat().st_size < 3_000_000 and '<script' not in html and not re.search(r'(src|href)="(?!data:|#)', html)
    for word in ('Research and teaching only', 'Head to head', 'Paired tests', 'Calibration', 'Split audit', 'Odd cases', 'Examples',
                 'Published results', 'Trained for 3 epochs', 'weights of stage2', 'version of torch'): assert word in html, word
    assert str(REPO) not in html and str(smoke['folder']) not in html


def test_checkpoints_need_no_library(smoke):
    "A checkpoint loads with plain transformers, in a process that cannot import llava_med."
    code = ("import sys; sys.modules['llava_med'] = None\n"
            "from transformers import AutoModelForImageTextToText, AutoProcessor\n"
            "m = AutoModelForImageTextToText.from_pretrained(sys.argv[1]); p = AutoProcessor.from_pretrained(sys.argv[1])\n"
            "print(type(m).__name__)")
    done = subprocess.run([sys.executable, '-c', code, str(smoke['folder']/'3_stage2_tuning/model')], capture_output=True, text=True)
    assert done.stdout.strip() == 'LlavaForConditionalGeneration', done.stderr[-1000:]


def test_unchanged_run_is_quick(smoke, outputs):
    done, took = command(outputs, 'run', 'smoke')
    assert done.returncode == 0 and '0 steps run, 5 kept' in done.stdout
    assert took < 15


def test_misspelt_parameter(outputs, smoke):
    before = (outputs/'smoke/run.json').read_text()
    done, _ = command(outputs, 'run', 'smoke', '--set', '2_stage1_alignment.epoch=1')
    assert done.returncode == 2 and 'Did you mean epochs?' in done.stderr and 'lr' in done.stderr
    assert (outputs/'smoke/run.json').read_text() == before


def alone(outputs, step, **parameters):
    "Execute one notebook with papermill alone, on what the smoke run left."
    import papermill
    with pytest.MonkeyPatch.context() as m:
        for k, v in dict(LLAVA_MED_OUTPUTS=outputs, LLAVA_MED_ROOT=REPO, PYTHONPATH=REPO).items(): m.setenv(k, str(v))
        values = {'inputs_from': 'smoke', **parameters}
        started(lambda **own: papermill.execute_notebook(str(REPO/f'nbs/pipeline/{step}.ipynb'), str(outputs/'out.ipynb'), values,
                                                         kernel_name='python3', progress_bar=False, **own))


def test_a_notebook_by_itself(outputs, smoke):
    "It reads another run and writes to scratch."
    alone(outputs, '2_stage1_alignment', epochs=1)
    assert (outputs/'scratch/2_stage1_alignment/model/config.json').exists()
    assert json.loads((outputs/'scratch/run.json').read_text())['steps']['2_stage1_alignment']['state'] == 'done'


def test_missing_input_is_one_sentence(outputs, smoke):
    done, _ = command(outputs, 'run', 'smoke', '--name', 'empty', '--only', '2')
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert '1_data_prep' in last and 'llava-med run smoke --name empty --only 1_data_prep' in last and 'Traceback' not in done.stderr


def by_hand(outputs, **parameters):
    "Execute 4_evaluation alone on the smoke run's models; its scores and its report."
    alone(outputs, '4_evaluation', n_draws=200, **parameters)
    folder = outputs/parameters['run']/'4_evaluation'
    return rows(folder/'scores.csv'), (folder/'report.html').read_text(encoding='utf-8')


@pytest.mark.slow
@pytest.mark.parametrize('name,part', [('vqa_rad', 'test (71 of 451)'), ('slake', 'test (118 of 1061)')])
def test_real_sets_go_through_the_evaluation(outputs, smoke, name, part):
    "Items whose images are there are asked; the others are counted; controls and audit are of the whole set."
    data = data_folder()
    if data is None or not (data/name).is_dir(): pytest.skip(f'no real {name}: set LLAVA_MED_TESTDATA')
    table, html = by_hand(outputs, run=f'real_{name}', vqa=str(data/name))
    assert {r['dataset'] for r in table} == {name}
    keys = [tuple(r[k] for k in SCORES[:6]) for r in table]
    assert len(set(keys)) == len(keys)
    whole = {r['model']: r for r in table if r['split'] == 'test' and r['metric'] == 'llavamed_v1.closed_substring' and r['slice'] == 'all'}
    assert {'always_yes_no', 'prior_question_type'} <= set(whole) and float(whole['always_yes_no']['value']) > .8
    missing = [r for r in table if r['metric'] == 'images.missing']
    assert len(missing) == 1 and float(missing[0]['value']) > 80 and 'images are missing' in html
    assert 'Split audit' in html and 'LLaVA-Med from LLaVA, tuned 15 epochs' in html
    asked = {r['split'] for r in table if r['model'] == 'stage2'}
    assert asked == {part} and 'must not be compared' in html


@pytest.mark.slow
def test_a_real_set_without_one_image_is_refused(outputs, smoke):
    data = data_folder()
    if data is None or not (data/'pathvqa').is_dir(): pytest.skip('no real pathvqa: set LLAVA_MED_TESTDATA')
    with pytest.raises(Exception, match='none of the 858 images of its questions is here; name their folder'):
        by_hand(outputs, run='real_pathvqa', vqa=str(data/'pathvqa'))
    assert not (outputs/'real_pathvqa/4_evaluation/scores.csv').exists()


@pytest.mark.slow
def test_a_prompt_is_chosen_and_a_tuned_model_joins(outputs, smoke):
    import shutil
    model = outputs/'smoke/3b_vqa_tuning/model'
    shutil.copytree(outputs/'smoke/3_stage2_tuning/model', model)
    try: table, html = by_hand(outputs, run='asked', prompts=['{question} answer in one word.'], n_shots=1, n_test_images=4, n_small_questions=20,
                               n_captions=2, n_text=4, n_prompt_questions=30)
    finally: shutil.rmtree(model.parent)
    assert {'tuned', 'tuned-stage2', 'tuned-base'} <= {r['model'] for r in table} and 'Choice of prompts' in html
    assert (outputs/'asked/4_evaluation/cards/3b_vqa_tuning/model/README.md').exists()


@pytest.mark.slow
def test_named_models_and_pairs_are_asked_and_subtracted(outputs, smoke):
    import shutil
    shutil.copytree(outputs/'smoke/3_stage2_tuning/model', outputs/'smoke/dpo/model')
    named = dict(models={'dpo': 'dpo', 'untuned': 'data/base_tiny', 'stage2': '3_stage2_tuning'}, pairs=[['dpo', 'stage2'], ['dpo', 'untuned']])
    try: table, html = by_hand(outputs, run='named', **named, slices=['kind'], n_test_images=4, n_small_questions=20, n_captions=2, n_text=4)
    finally: shutil.rmtree(outputs/'smoke/dpo')
    assert {r['model'] for r in table} >= {'dpo', 'untuned', 'stage2', 'dpo-stage2', 'dpo-untuned'} and 'weights of dpo' in html
    assert not {'base', 'stage2-base', 'stage1'} & {r['model'] for r in table}
    at = {(r['model'], r['condition']): r for r in table if (r['slice'], r['metric']) == ('all', 'strict')}
    assert float(at['dpo-stage2', 'image']['value']) == 0 and at['dpo', 'blank']['n_items'] == at['dpo', 'image']['n_items']
    assert {r['metric'] for r in table if r['model'] == 'dpo-untuned'} >= {'strict', 'perplexity', 'paired.strict.p'}
    assert any(r['slice'].startswith('kind=') for r in table)
    for r in table:   # a difference and its test say the same
        if r['metric'] != 'strict' or r['slice'] != 'all' or '-' not in r['model'] + r['condition']: continue
        p = next(x for x in table if x['metric'] == 'paired.strict.p' and (x['model'], x['condition']) == (r['model'], r['condition']))
        assert (float(p['value']) < .05) == (float(r['low']) > 0 or float(r['high']) < 0)


@pytest.mark.parametrize('parameters, why', [
    (dict(models={'dpo': 'dpo'}), "neither such a step with a model in smoke or wrong"),
    (dict(pairs=[['stage2', 'dpo']]), "no model named 'dpo' among those asked. Known: base, stage1, stage2"),
    (dict(conditions=['blnk']), "conditions: there is no condition named 'blnk'. Did you mean blank"),
    (dict(slices=['sight']), "slices: there is no tag named 'sight'")])
def test_a_wrong_name_stops_the_evaluation_before_it_asks(outputs, smoke, parameters, why):
    with pytest.raises(Exception, match=why): alone(outputs, '4_evaluation', run='wrong', **parameters)
    assert not (outputs/'wrong/4_evaluation/.answers.jsonl').exists()


@pytest.mark.slow
def test_same_seed_same_scores(outputs, smoke):
    done, _ = command(outputs, 'run', 'smoke', '--name', 'again')
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (outputs/r/'4_evaluation/scores.csv' for r in ('smoke', 'again'))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.slow
def test_another_seed_other_scores(outputs, smoke):
    done, _ = command(outputs, 'run', 'smoke', '--name', 'seed1', '--set', 'all.seed=1')
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (outputs/r/'4_evaluation/scores.csv' for r in ('smoke', 'seed1'))
    assert first.read_bytes() != second.read_bytes()


@pytest.mark.slow
def test_real_articles_go_through_both_stages(outputs):
    "Figures of real articles whose images are present stand in both training sets and are trained on."
    data = data_folder()
    if data is None or not (data/'articles').is_dir(): pytest.skip('no real articles: set LLAVA_MED_TESTDATA')
    done, _ = command(outputs, 'run', 'smoke', '--name', 'real', '--only', '1', '2', '3', '--set', f'1_data_prep.articles=[{data/"articles"}]')
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    d = outputs/'real/1_data_prep'
    real = {f['id'] for f in map(json.loads, (d/'figures.jsonl').open(encoding='utf-8')) if not f['source'].startswith('phantoms/')}
    assert len(real) > 10
    for name in ('alignment', 'instruct'):
        records = json.loads((d/f'{name}.json').read_text())
        images = {r['image'] for r in records if r['id'] in real}
        assert len(images) > (10 if name == 'alignment' else 3) and all((d/'images'/i).is_file() for i in images)
    assert (outputs/'real/3_stage2_tuning/model/model.safetensors').exists()


@pytest.mark.slow
def test_files_of_conversations_go_through_both_stages(outputs, smoke, tmp_path):
    "Conversations in LLaVA-Med's own form, with and without a picture, one of them gone, are what the stages learn from."
    made = smoke['folder']/'1_data_prep'
    (tmp_path/'images').mkdir()
    for name in ('alignment', 'instruct'):
        kept = json.loads((made/f'{name}.json').read_text())[:12]
        for r in kept: (tmp_path/'images'/r['image']).write_bytes((made/'images'/r['image']).read_bytes())
        kept[3]['image'] = 'gone.jpg'
        said = [{'from': 'human', 'value': 'what is a cyst?'}, {'from': 'gpt', 'value': 'a sac filled with fluid.'}]
        text = json.dumps([dict(id=r['id'], image=r['image'], conversatons=r['conversations']) for r in kept] + [dict(id='text', conversatons=said)])
        (tmp_path/f'{name}.json').write_text(text)
    sets = [f'{s}.{k}={v}' for s, n in (('2_stage1_alignment', 'alignment'), ('3_stage2_tuning', 'instruct')) for k, v in (('data', tmp_path/f'{n}.json'), ('data_images', tmp_path/'images'))]
    done, _ = command(outputs, 'run', 'smoke', '--name', 'own', '--only', '1', '2', '3', '--set', *sets)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    said = (outputs/'own/2_stage1_alignment/2_stage1_alignment.ipynb').read_text()
    assert '1 of 13 records are left out' in said and 'there is no such file' in said
    ledger = json.loads((outputs/'own/3_stage2_tuning/ledger.json').read_text())
    assert ledger['samples'] == 12*json.loads((outputs/'own/run.json').read_text())['steps']['3_stage2_tuning']['parameters']['epochs']
    (tmp_path/'instruct.json').write_text(json.dumps([dict(id='1', image='gone.jpg', conversations=kept[0]['conversations'])]))
    done, _ = command(outputs, 'run', 'smoke', '--name', 'own', '--only', '3', '--set', *sets[2:])
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and 'instruct.json: no record can be used' in last and '1 of 1 records are left out' in last


TWICE = '''
description: The smoke test's curriculum, and a second tuning of few weights after stage 2.
parameters:
  all: {threads: 1}
  1_data_prep: {n_figures: 80, n_vqa_images: 12, n_val_images: 8, n_test_images: 12}
  2_stage1_alignment: {epochs: 1}
  3_stage2_tuning: {epochs: 1}
steps:
- 1_data_prep
- 2_stage1_alignment
- 3_stage2_tuning
- name: narrow
  notebook: 3_stage2_tuning
  start_from: 3_stage2_tuning
  epochs: 2
  save_s: 0.0
  stage: {trainable: [last_block, norms], sampler: mixture, schedule: linear}
- name: 4_evaluation
  models: {stage2: 3_stage2_tuning, narrow: narrow}
  pairs: [[narrow, stage2]]
  n_test_images: 8
  n_small_questions: 20
  n_captions: 4
  n_text: 4
  n_draws: 100
'''


def weights(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob('*.safetensors'))}


def killed_in(outputs, step, *words):
    "Run `llava-med` and kill it and all that it started when a step has trained for three steps."
    code = 'import sys; from llava_med.lab.commands import main; sys.exit(main())'
    env = {**os.environ, 'LLAVA_MED_ROOT': str(REPO), 'LLAVA_MED_OUTPUTS': str(outputs), 'PYTHONPATH': str(REPO)}
    p = subprocess.Popen([sys.executable, '-c', code, *words], env=env, stdout=subprocess.DEVNULL, start_new_session=True)
    progress = outputs/words[words.index('--name') + 1]/step/'.checkpoint/progress.json'
    deadline = time.time() + 300
    while time.time() < deadline and p.poll() is None:
        try:
            if json.loads(progress.read_text())['done'] >= 3: break
        except (OSError, ValueError): pass
        time.sleep(.05)
    assert p.poll() is None, f'{step} ended before it was killed'
    everyone = [*psutil.Process(p.pid).children(recursive=True), psutil.Process(p.pid)]
    for q in everyone: q.kill()
    p.wait()
    psutil.wait_procs(everyone, 20)


@pytest.mark.slow
def test_a_second_tuning_has_a_name_of_its_own(outputs, tmp_path):
    "Planned, trained under its name, killed and resumed to the bit, and paired with stage 2 in one table."
    preset = tmp_path/'twice.yaml'
    preset.write_text(TWICE)
    done, _ = command(outputs, 'run', str(preset), '--name', 'quiet')
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    quiet, rough = outputs/'quiet', outputs/'rough'
    parameters = json.loads((quiet/'run.json').read_text())['steps']['narrow']['parameters']
    assert parameters['stage']['trainable'] == ['last_block', 'norms']
    ledger = json.loads((quiet/'narrow/ledger.json').read_text())
    assert 0 < ledger['trainable_params'] < json.loads((quiet/'3_stage2_tuning/ledger.json').read_text())['trainable_params']
    table = rows(quiet/'4_evaluation/scores.csv')
    assert {'stage2', 'narrow', 'narrow-stage2'} <= {r['model'] for r in table}
    pair = [r for r in table if r['model'] == 'narrow-stage2' and r['condition'] == 'image' and r['slice'] == 'all' and r['metric'] == 'strict']
    assert pair and all(r['low'] and int(r['n_clusters']) > 0 for r in pair)
    steps = ['1_data_prep', '2_stage1_alignment', '3_stage2_tuning', 'narrow']
    only = [w for s in steps for w in ('--only', s)]
    killed_in(outputs, 'narrow', 'run', str(preset), '--name', 'rough', *only)
    assert not (rough/'narrow/model').exists()
    done, _ = command(outputs, 'run', str(preset), '--name', 'rough', *only)
    assert done.returncode == 0 and '1 steps run, 3 kept' in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
    assert weights(quiet/'narrow/model') == weights(rough/'narrow/model')
    assert (quiet/'narrow/losses.csv').read_text() == (rough/'narrow/losses.csv').read_text()
    assert weights(quiet/'narrow/model') != weights(quiet/'3_stage2_tuning/model')
