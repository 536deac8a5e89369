"The benchmarks of training run at a tiny size, their gates open for equal steps only, and reports read what batches left."
import contextlib
import csv
import json
import re
import sys

import papermill
import pytest
import torch
from llava_med.train import batches as library
from llava_med.train.batches import IGNORE, Collator, batch_loss, pack_shared_prefixes
from llava_med.models.anatomy import set_trainable
from llava_med.models.llava import tiny_model
from llava_med.train.packing import PackedCollator, pack_rows
from llava_med.core.runs import write_csv, write_json, write_jsonl
from llava_med.lab.runner import started
from llava_med.world.sets import write_vqa


@pytest.fixture(scope='module')
def toy():
    "Eight conversations of different length about three pictures, and features of these."
    model, processor = tiny_model(image_size=24)
    image, n = model.config.image_token_id, model.config.image_seq_length
    rng = torch.Generator().manual_seed(0)
    words = lambda k: torch.randint(6, 60, (k,), generator=rng).tolist()
    samples = []
    for i in range(8):
        said = words(3 + i)
        samples.append(dict(input_ids=[1] + [image]*n + words(4) + said, labels=[IGNORE]*(n + 5) + said, image=i % 3))
    return samples, torch.randn(3, n, model.config.vision_config.hidden_size, generator=rng), image, processor.tokenizer.pad_token_id


def step(batches):
    "Loss and gradient of a fresh model over batches, divided by the number of scored tokens."
    model = tiny_model(image_size=24)[0].train()
    for p in model.model.language_model.parameters():
        if p.dim() > 1: p.data.mul_(4)
    set_trainable(model, ('projector', 'language_model'))
    model.set_attn_implementation({'text_config': 'segmented' if any('layout' in b for b in batches) else 'sdpa'})
    done = []
    for b in batches: done.append(batch_loss(model, b)); done[-1][0].backward()
    n = sum(k for _, k in done)
    params = [p.grad.flatten()/n for p in model.parameters() if p.requires_grad and p.grad is not None]
    return sum(t.item() for t, _ in done)/n, torch.cat(params)


def off(a, b): return float((a - b).norm()/b.norm())


@pytest.fixture(scope='module')
def alone(toy):
    samples, features, _, pad = toy
    return step([Collator(pad, features)([s]) for s in samples])


def test_rows_of_shared_pictures_pass_the_gates(toy, alone):
    samples, features, image, pad = toy
    rows = pack_rows(pack_shared_prefixes(samples, image), 60)
    loss, grad = step([PackedCollator(pad, features)([r]) for r in rows])
    assert abs(loss - alone[0]) < 1e-5 and off(grad, alone[1]) < 1e-4


def test_a_last_layer_on_all_tokens_is_the_same_step(toy, alone, monkeypatch):
    samples, features, _, pad = toy
    monkeypatch.setattr(library, 'last_layer_at', lambda *args: contextlib.nullcontext())
    loss, grad = step([Collator(pad, features)(samples)])
    assert abs(loss - alone[0]) < 1e-5 and off(grad, alone[1]) < 1e-4


@pytest.mark.parametrize('fault', ['isolation', 'picture', 'label'])
def test_the_gates_catch(toy, alone, fault):
    samples, features, image, pad = toy
    row = pack_rows(samples, 10**6)[0]
    n = len(row['blocks'])
    if fault == 'isolation': row.update(blocks=[0]*n, segments=[0]*n, positions=list(range(n)))
    if fault == 'picture': features = features.roll(1, 0)
    if fault == 'label': row['labels'][-1] = IGNORE
    loss, grad = step([PackedCollator(pad, features)([row])])
    assert abs(loss - alone[0]) > 1e-5 and off(grad, alone[1]) > 1e-4


def test_checkpointing_of_the_last_layer_still_works(toy, alone):
    samples, features, _, pad = toy
    model = tiny_model(image_size=24)[0].train()
    for p in model.model.language_model.parameters():
        if p.dim() > 1: p.data.mul_(4)
    model.gradient_checkpointing_enable(dict(use_reentrant=False))
    loss, n = batch_loss(model, Collator(pad, features)(samples))
    loss.backward()
    assert abs(loss.item()/n - alone[0]) < 1e-5


def test_a_caption_right_behind_its_picture_is_not_shared(toy):
    samples, features, image, pad = toy
    bare = [dict(input_ids=[1, *[image]*4, 9 + i, 10], labels=[IGNORE]*5 + [9 + i, 10], image=0) for i in (0, 1)]
    assert len(pack_shared_prefixes(bare, image)) == 2
    (a, g), (b, h) = step([Collator(pad, features)([s]) for s in bare]), step([PackedCollator(pad, features)(pack_rows(pack_shared_prefixes(bare, image), 60))])
    assert abs(a - b) < 1e-5 and off(h, g) < 1e-4


def run(repo, tmp_path, name, **parameters):
    "A benchmark at a tiny size; returns what it printed."
    source, out = repo/f'nbs/benchmarks/{name}.ipynb', tmp_path/f'{name}.ipynb'
    made = started(lambda **own: papermill.execute_notebook(source, out, parameters, kernel_name='python3', cwd=tmp_path, progress_bar=False,
                                                            **own))
    return '\n'.join(o.text for c in made.cells for o in c.get('outputs', []) if o.output_type == 'stream')


REAL_WORK = 'phantoms, real model of 3 M, float32'

@pytest.mark.slow
def test_training_speed(repo, tmp_path):
    write_vqa(tmp_path/'phantoms', 4, 1, 1, seed=11)
    was = dict(work=REAL_WORK, system='TRL, tuned', metric='loss', value=9., unit='', low=9., high=9.)
    other = was | dict(work='another real model')
    write_json(tmp_path/'small.json', dict(rows=[was, other], ratios=dict(real_other=7.), ranges=dict(real_other=[6., 8.]), dates=dict(real_other='2026'), real={REAL_WORK: {}, 'another real model': dict(date='2026', threads=2)}))
    said = run(repo, tmp_path, 'training_speed', rounds=1, width=64, depth=2, image_size=56, batch=4, memory=False, out='small.json',
               real_model=str(repo/'data/base_tiny'), real_vqa=str(tmp_path/'phantoms'), real_rounds=1, real_pictures=2, real_threads=1)
    got = json.loads((tmp_path/'small.json').read_text())
    assert got['ratios']['real_other'] == 7. and other in got['rows'] and was not in got['rows']   # another model's rows stay, this one's are new
    loss = {r['system']: r['value'] for r in got['rows'] if r['work'] == REAL_WORK and r['metric'] == 'loss'}
    assert abs(loss['ours'] - loss['transformers, tuned']) < 1e-3 and {'real_phantoms', 'real_other'} <= set(got['ratios'])
    assert got['real'][REAL_WORK]['threads'] == 1 and 'questions an image' in said
    assert {'vqa_slake', 'vqa_rad', 'stage1_vs_hf', 'stage1_vs_best', 'stage2_vs_hf', 'stage2_vs_best'} <= set(got['ratios'])
    assert 'NOT THE SAME STEP' in said and 'epoch 2: 0 of 4 pictures opened' in said
    assert {tuple(r) for r in got['rows']} == {('work', 'system', 'metric', 'value', 'unit', 'low', 'high')}
    if 'TRL is not installed' in said:
        assert not any('TRL' in r['system'] for r in got['rows'] if r != other)


STUB = '''
from types import SimpleNamespace as Bag

class SamplingParams:
    def __init__(self, temperature, max_tokens): self.max_tokens = max_tokens

class LLM:
    "Answers by transformers, as vLLM would."
    def __init__(self, model, dtype, **how):
        import torch
        from llava_med.models.llava import load
        torch.set_num_threads(1)
        (self.model, self.processor), self.llm_engine, self.forgotten = load(model, 'cpu', dtype), self, set()
    def reset_prefix_cache(self): self.forgotten.add('prefixes')
    def reset_mm_cache(self): self.forgotten.add('images')
    def reset_encoder_cache(self): self.forgotten.add('features')
    def generate(self, prompts, settings, use_tqdm):
        from llava_med.models.templates import model_inputs
        assert len(self.forgotten) == 3
        self.forgotten.clear()
        print('a line that is no answer')
        return [self.one(o, settings.max_tokens, model_inputs) for o in prompts]
    def one(self, prompt, most, model_inputs):
        x = model_inputs(self.processor, [prompt['prompt']], [[prompt['multi_modal_data']['image']]])
        ids = self.model.generate(**x, max_new_tokens=most, do_sample=False)[0, x['input_ids'].shape[1]:]
        return Bag(outputs=[Bag(text=self.processor.tokenizer.decode(ids, skip_special_tokens=True))])
'''


def vllm_like(repo, folder, text=STUB):
    "A Python whose `vllm` is ours."
    folder.mkdir()
    (folder/'vllm.py').write_text(text)
    (folder/'python').write_text(f'#!/bin/sh\nPYTHONPATH={folder}:{repo} OMP_NUM_THREADS=1 exec {sys.executable} "$@"\n')
    (folder/'python').chmod(0o755)
    return str(folder/'python')


@pytest.mark.slow
def test_evaluation_speed_beside_vllm(repo, tmp_path):
    write_vqa(tmp_path/'phantoms', 1, 1, 3, seed=11)
    committed = json.loads((repo/'nbs/benchmarks/results/evaluation_speed.json').read_text())
    write_json(tmp_path/'small.json', committed)
    small = dict(minutes=0, out='small.json', real_model=str(repo/'data/base_tiny'), real_vqa=str(tmp_path/'phantoms'), real_dtypes='float32',
                 real_rounds=1, real_images=2, real_generate=1, real_threads=1)
    run(repo, tmp_path, 'evaluation_speed', **small, vllm_python=vllm_like(repo, tmp_path/'env'))
    got = json.loads((tmp_path/'small.json').read_text())
    assert [r for r in got['rows'] if r['work'] != REAL_WORK] == committed['rows'] and got['date'] == committed['date']
    new = {(r['system'], r['metric']): r['value'] for r in got['rows'] if r['work'] == REAL_WORK}
    assert new['vLLM', 'equal_answers'] == new['batched generate', 'equal_answers'] == 1
    assert abs(new['ours / vLLM', 'ratio'] - new['ours', 'questions_per_second']/new['vLLM', 'questions_per_second']) < .5
    assert set(got['ratios']) - set(committed['ratios']) == {'real_phantoms_vs_vllm', 'real_phantoms_vs_generate'}
    run(repo, tmp_path, 'evaluation_speed', **small)   # without vLLM its rows stay
    again = json.loads((tmp_path/'small.json').read_text())
    assert again['ratios']['real_phantoms_vs_vllm'] == got['ratios']['real_phantoms_vs_vllm']
    assert again['real'][REAL_WORK]['dates']['vLLM'] == got['real'][REAL_WORK]['dates']['vLLM'] < again['real'][REAL_WORK]['dates']['ours']


@pytest.mark.slow
def test_training_scale(repo, tmp_path):
    run(repo, tmp_path, 'training_scale', rounds=1, width=64, depth=2, image_size=56, most=8, out='small.json')
    got = json.loads((tmp_path/'small.json').read_text())
    assert set(got['ratios']) == {'pictures', 'answer_tokens_300', 'questions_16'}


@pytest.mark.slow
def test_training_gpu_runs_without_one_and_writes_nothing(repo, tmp_path):
    rows = [dict(work=f'{w}, 336 px, Mistral-7B', system='ours', metric=m, value=.5, unit='', low=.5, high=.5) for w in ('stage 1', 'stage 2') for m in ('mfu', 'projected')]
    (tmp_path/'training_toy.json').write_text(json.dumps(dict(machine=dict(gpu='toy'), peak_tflops=989., rows=rows, ratios=dict(hours_336=1))))
    said = run(repo, tmp_path, 'training_gpu', device='cpu', results=str(tmp_path))
    assert 'Nothing written' in said and [p.name for p in tmp_path.glob('*.json')] == ['training_toy.json']


@pytest.mark.slow
@pytest.mark.parametrize('name, parameters, says', [('training_speed', dict(rounds=0), 'rounds is 0'), ('training_speed', dict(image_size=100), '100'),
                                                    ('training_scale', dict(most=2), 'most 2'), ('evaluation_speed', dict(minutes=0, real_model='data/base_tiny'), 'real_vqa'), ('training_gpu', dict(device='cuda'), 'no GPU')])
def test_bad_parameters_say_so(repo, tmp_path, name, parameters, says):
    if says == 'no GPU' and torch.cuda.is_available(): pytest.skip('There is a GPU.')
    with pytest.raises(papermill.PapermillExecutionError, match=f'ValueError: .*{says}'): run(repo, tmp_path, name, **parameters)


# Reports about batches

@pytest.mark.slow
@pytest.mark.parametrize('name', ['paper_ablations', 'sensitivity'])
def test_a_report_reads_the_committed_tables(repo, tmp_path, name):
    said = run(repo, tmp_path, name, results=str(repo/'nbs/benchmarks/results'))
    assert re.search(r'[\d,]+ scores; \d+ settings, seeds 0, 1, 2', said)


@pytest.mark.slow
def test_the_report_of_the_real_model_reads_the_committed_rows(repo, tmp_path):
    results = repo/'nbs/benchmarks/results'
    said = run(repo, tmp_path, 'real_small', rows=str(results/'real_small_runs.csv'), items=str(results/'real_small_items.csv'), out='small.json', draws=200)
    got = json.loads((tmp_path/'small.json').read_text())
    assert re.search(r'\d+ finished runs of \d+ arms', said) and got['name'] == 'real_small'
    assert all(r['low'] <= r['value'] <= r['high'] for r in got['rows'])


def test_verdicts_follow_from_the_committed_marks(repo):
    "Differences are means over the questions that both models were asked; a verdict needs both intervals to leave zero out."
    folder = repo/'nbs/benchmarks/results'
    told = {r['claim']: r for r in csv.DictReader((folder/'paper_ablations_verdicts.csv').open(newline=''))}
    _, *marks = map(json.loads, (folder/'paper_ablations_right.jsonl').read_text().splitlines())
    right = {m['of']: m['right'] for m in marks}
    for claim, a, b in (('Both stages answer better than the base', 'both/{}/stage2', 'both/{}/base'), ('VQA tuning of the base, 3 epochs or none', 'vqa_base-epochs3/{}/tuned', 'both/{}/base'),
                        ('Nine epochs instead of three', 'passes-epochs9/{}/stage2', 'both/{}/stage2'), ('As published: 15 epochs against 3', 'vqa_stage2-epochs15/{}/tuned', 'vqa_base-epochs3/{}/tuned')):
        pairs = [[(x == '1') - (y == '1') for x, y in zip(right[a.format(s)], right[b.format(s)]) if '-' not in x + y] for s in range(3)]
        assert abs(float(told[claim]['mean']) - 100*sum(sum(p)/len(p) for p in pairs)/3) < .02, claim
    for claim, r in told.items():
        ours, theirs = (float(r['low'])*float(r['high']) > 0, r['paper'] and abs(float(r['paper'])) > float(r['paper_half']))
        alike = float(r['mean'])*float(r['paper'] or 0) > 0
        assert r['verdict'] == ('not in the paper' if not r['paper'] else ('agrees' if alike else 'disagrees') if ours and theirs else
                                'undecided ' + ('in the paper' if ours else 'here' if theirs else 'in both')), claim
        if ours and float(r['p_holm']) >= .05: assert r['verdict'] == 'undecided in the paper', f'{claim}: too many comparisons for this verdict'


@pytest.mark.slow
def test_a_report_of_a_batch_that_is_known(repo, tmp_path, monkeypatch):
    "Accuracy falls by 20 points at every seed and picture under a strong prior; errors change nothing that three seeds could tell."
    monkeypatch.setenv('LLAVA_MED_OUTPUTS', str(tmp_path/'outputs'))
    with pytest.raises(papermill.PapermillExecutionError, match='run `llava-med batch sensitivity` first'):
        run(repo, tmp_path, 'sensitivity', refresh=True, results=str(tmp_path))
    axes = {'prior': '1_data_prep.skew', 'errors': '1_data_prep.error_rate', 'captions': '1_data_prep.caption_noise'}
    rows = []
    for case, amount, drop in (('prior', 0, 0), ('prior', .9, .2), ('errors', .5, 0), ('captions', .5, .1)):
        for seed in range(3):
            value = .8 - drop + (seed - 1)*(.02 if case == 'errors' else .01)
            for model, condition, metric, v in (('stage2', 'image', 'strict', value), ('stage2', 'blank', 'strict', .4), ('stage2', 'image-blank', 'strict', value - .4),
                                                ('stage1', 'image', 'finding_recall', .1)):
                rows.append({'run': f'{case}-x{amount:g}-s{seed}', 'case': case, **{k: 0 for k in axes.values()}, axes[case]: amount, 'seed': seed, 'state': 'done',
                             'model': model, 'condition': condition, 'metric': metric, 'value': v, 'low': v - .02, 'high': v + .02, 'n_items': 100})
            folder = tmp_path/f'outputs/sensitivity/{case}-x{amount:g}-s{seed}'   # ten pictures with a hundred questions, as many right for each
            answers = [dict(id=f'{p}-{q}', images=[f'{p}.jpg'], question=f'Number {q}?', answer='yes', answer_type='CLOSED', options=[], tags={}, split='test', regions=[], twin_of=None, source='toy')
                       for p in range(10) for q in range(100)]
            said = [dict(item=o['id'], condition=c, model='stage2', text='yes' if int(o['id'].split('-')[1]) < round(100*v) else 'no') for o in answers for c, v in (('image', value), ('blank', .4))]
            turns = [dict(zip(('from', 'value'), t)) for t in (('human', '<image>\nIs it?'), ('gpt', 'no' if case == 'errors' else 'yes'))]
            write_json(folder/'1_data_prep/vqa/test.json', answers)
            write_json(folder/'1_data_prep/instruct.json', [dict(id='a', image='a.jpg', conversations=turns)])
            write_jsonl(folder/'1_data_prep/figures.jsonl', [dict(id='a', **dict(text_of='b') if case == 'captions' else {})])
            write_jsonl(folder/'4_evaluation/predictions.jsonl', said)
    write_csv(tmp_path/'outputs/sensitivity/table.csv', rows, list(rows[0]))
    said = run(repo, tmp_path, 'sensitivity', refresh=True, results=str(tmp_path))
    assert 'prior: accuracy 0.80 → 0.60 at 0.9; the gain from the image falls: -20.0 [-20.0, -20.0] points' in said
    assert 'errors: accuracy 0.80 → 0.80 at 0.5; the gain from the image undecided' in said and (tmp_path/'sensitivity.csv').exists()
    data = {r['setting']: r for r in csv.DictReader((tmp_path/'sensitivity_data.csv').open(newline=''))}
    assert (data['prior-x0']['wrong'], data['errors-x0.5']['wrong'], data['prior-x0']['misplaced'], data['captions-x0.5']['misplaced']) == ('0.0', '1.0', '0.0', '1.0')
