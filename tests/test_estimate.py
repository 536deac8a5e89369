"Presets of real models: what they say, what a plan counts, and the pipeline on thin models of their kind."
import csv
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
import torch

from llava_med.lab import estimate, rehearsal
from llava_med.lab.publishing import relink
from llava_med.lab.steps import missing_files
from llava_med.lab.presets import plan_run, read_preset
from llava_med.lab.steps import UsageError
from llava_med.data.catalogue import CATALOGUE
from llava_med.models.llava import load
from llava_med.core.runs import read_json

REPO = Path(__file__).resolve().parents[1]
SHIPPED = sorted(p.relative_to(REPO/'nbs/pipeline/presets').with_suffix('').as_posix() for p in (REPO/'nbs/pipeline/presets').rglob('*.yaml'))
CURRICULA = [n for n in SHIPPED if not n.startswith('recipes/')]   # a recipe's study has no stages to plan: it trains the shipped model
LARGE = [n for n in CURRICULA if n not in ('tiny', 'smoke', 'laptop_smoke')]
LAYOUTS = json.loads((Path(__file__).parent/'layouts_7b.json').read_text())
each = pytest.mark.parametrize('name', LARGE)
GPU = [n for n in LARGE if not n.startswith('laptop')]   # these are meant for a processor, and small


def command(root, outputs, *words):
    "`llava-med …` in a process of its own."
    env = {**os.environ, 'LLAVA_MED_ROOT': str(root), 'LLAVA_MED_OUTPUTS': str(outputs), 'PYTHONPATH': str(REPO)}
    env.pop('LLAVA_MED_RUNNER', None)
    return subprocess.run([sys.executable, '-c', 'import sys; from llava_med.lab.commands import main; sys.exit(main())', *words], env=env, capture_output=True, text=True)


def odd(tmp_path, text, name='odd'):
    p = tmp_path/f'{name}.yaml'
    p.write_text(text)
    return str(p)


# What the presets say

@pytest.mark.parametrize('name', SHIPPED)
def test_a_preset_fits_the_notebooks(name):
    p = read_preset(name)
    plan_run(p, name)
    assert p['description'] and set(p['evidence']) == {'measured', 'rehearsed', 'never run'}


@each
def test_a_large_preset_is_pinned(name):
    p = read_preset(name)
    repos = {e.name: e for e in CATALOGUE}
    pinned = p['model']['revision']
    assert set(pinned) == set(p['model']['licence'])
    for part, revision in pinned.items():
        assert revision == (repos[part].revision or 'unverified'), part
        assert revision == 'unverified' or re.fullmatch('[0-9a-f]{40}', revision)
    asked = [w for c in p['needs'].values() for m in re.findall(r'llava-med get ((?!pmc)[\w.-]+)', c) for w in [m]]
    parts = {first for a in asked if a in repos for first, *_ in repos[a].parts or ()}   # of what is joined here
    assert set(asked) <= set(repos) and set(pinned) <= set(asked) | parts
    assert p['hardware']['memory_gb'] and p['data']['disk_gb'] and p['data']['licence']


@each
def test_what_a_large_preset_names_has_a_command(name):
    p = read_preset(name)
    texts = [t for values in p['parameters'].values() for v in values.values() for t in (v if isinstance(v, list) else [v]) if isinstance(t, str)]
    assert {t for t in texts if t.startswith('data/')} <= set(p['needs'])
    assert all(c.startswith('llava-med ') for c in p['needs'].values())


def test_a_file_that_is_missing_is_named_before_anything_runs(tmp_path):
    p = odd(tmp_path, 'needs: {data/none_here: llava-med get tiny_thing}\nparameters: {2_stage1_alignment: {base_model: data/none_here}}')
    done = command(REPO, tmp_path/'outputs', 'run', p)
    assert done.returncode == 2 and 'needs data/none_here, which is not there: `llava-med get tiny_thing`' in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and not (tmp_path/'outputs').exists()
    recipe = read_preset(p)
    assert not missing_files(recipe, plan_run(recipe, 'x', ['1_data_prep'])), 'a step that does not read it may run'


@pytest.mark.parametrize('text, says', [
    ('', 'is empty'),
    ('# nothing\n', 'is empty'),
    ('modle: {checkpoint: llava_1.5_7b}', 'Did you mean model?'),
    ('model: {chekpoint: llava_1.5_7b}', 'Did you mean checkpoint?'),
    ('hardware: {gpu_s: 1}', 'Did you mean gpus?'),
    ('hardware: one GPU', '`hardware:` must hold'),
    ('evidence: {mesured: yes}', 'Did you mean measured?'),
    ('evidence: rehearst', 'Did you mean rehearsed?'),
    ('description: x', 'has no block `model:`'),
    ('model: {checkpoint: llava_1.5_8b}', "There is no architecture among the checkpoints (PATH, model) named 'llava_1.5_8b'. Did you mean llava_1.5_7b?"),
    ('model: {tower: clip_vit_l_336}', 'must name either a checkpoint, or a tower and a language_model'),
    ('model: {tower: clip_vit_l_337, language_model: llama_7b}', 'Did you mean clip_vit_l_336?'),
    ('model: {tower: {model_type: clip_vision_modell, patch_size: 14}, language_model: llama_7b, image_size: 224}', 'is no configuration that transformers reads'),
    ('model: {tower: clip_vit_l_14, language_model: llama_7b, image_size: big}', "image_size 'big' makes no patches of 14 px"),
    ('model: {checkpoint: llava_1.5_7b, image_size: 224}', 'image_size 224 is not that of llava_1.5_7b, which sees 336 px'),
    ('model: {checkpoint: llava_1.5_7b, connector: linear}', "connector 'linear' is not that of llava_1.5_7b"),
    ('model: {checkpoint: llava_1.5_7b, template: lava_v1}', "named 'lava_v1'. Did you mean llava_v1?"),
    ('model: {checkpoint: data/none}', 'there is no model in data/none'),
    ('model: {checkpoint: data/base_tiny}\nhardware: {memory_gb: much}', "hardware.memory_gb is 'much'"),
])
@pytest.mark.parametrize('words', [('plan',), ('run', '--rehearse')])
def test_a_wrong_preset_costs_one_sentence(tmp_path, capsys, monkeypatch, text, says, words):
    from llava_med.lab.commands import main
    if 'much' in text and words[0] == 'run': pytest.skip('a rehearsal needs no GPU')
    p = odd(tmp_path, text)
    assert main([words[0], p, *words[1:]]) == 2
    err = capsys.readouterr().err
    assert says.replace('PATH', p) in err and 'odd.yaml' in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path/'outputs').exists()


# What a plan counts

def expand(patterns):
    "Number of weights that patterns such as layers.{0-31}.{up,down}.weight stand for."
    total = 0
    for pattern, shape in patterns.items():
        n = 1
        for x in re.findall(r'\{([^}]*)\}', pattern):
            n *= int(x.split('-')[1]) - int(x.split('-')[0]) + 1 if re.fullmatch(r'\d+-\d+', x) else len(x.split(','))
        size = 1
        for s in shape: size *= s
        total += n*size
    return total


def counted(name): return sum(p.numel() for p in estimate.meta_model(estimate.real_config(read_preset(name))).parameters())


@pytest.mark.parametrize('name, layout', [('llava_med_v15', 'llava_med_v15'), ('llava15_7b', 'llava_15_7b'), ('llava_med_v1', 'llava_med_v10')])
def test_every_parameter_of_the_full_models_is_counted(name, layout): assert counted(name) == expand(LAYOUTS[layout]['standard'])


@pytest.mark.parametrize('name, known', [('llava15_7b', 7.06e9), ('llava_med_v15', (4.94e9 + 5.00e9 + 4.93e9 + .262e9)/2), ('small', 1.73e9/2)])
def test_counts_are_those_of_the_published_files(name, known): assert abs(counted(name)/known - 1) < .02


def test_the_shipped_base_is_counted():
    model, _ = load(REPO/'data/base_tiny')
    assert counted('tiny') == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize('name, stage1, stage2, adapter', [('llava_med_v15', 19.7, 40.1, 27.1), ('llava_med_v1', 9.52, 24.2, 16.3)])
def test_work_of_a_row(name, stage1, stage2, adapter):
    model = estimate.meta_model(estimate.real_config(read_preset(name)))
    got = [estimate.row_flops(model, *a)/1e12 for a in (('2_stage1_alignment', 100, 70), ('3_stage2_tuning', 350, 250))]
    assert abs(got[0]/stage1 - 1) < .02 and abs(got[1]/stage2 - 1) < .02
    assert 1 <= estimate.row_flops(model, '3_stage2_tuning', 350, 250, 64)/1e12/adapter < 1.06, 'as stage 1, and a little for the adapter itself'
    assert estimate.row_flops(model, '3_stage2_tuning', 350, 250, 0, True) > 1.3*estimate.row_flops(model, '3_stage2_tuning', 350, 250)


def test_memory_follows_what_learns_and_how_it_is_shared():
    model = estimate.meta_model(estimate.real_config(read_preset('llava_med_v15')))
    need = lambda gb=80, **values: estimate.stage_memory(model, '3_stage2_tuning', {'max_len': 2048, 'batch_size': 64, **values}, {'gpus': 1, 'memory_gb': gb}, 926, 250)
    fixed = lambda m: m['weights'] + m['gradients'] + m['moments']
    full, lora, shared = need(), need(lora_rank=128), need(nproc=8, sharding='fsdp')
    copies = 2*7.263e9/2**30   # in bfloat16, of what learns; each process has them all
    assert abs(fixed(full) - 16*7.263e9/2**30 - copies - 2*.304e9/2**30) < 1 and not full['fits']
    assert fixed(lora) < 22 and lora['fits'] and lora['gradient_checkpointing'] == 'off'
    assert fixed(shared) - copies < (fixed(full) - copies)/6 and shared['fits']
    assert need(gb=24, lora_rank=16)['gradient_checkpointing'] == 'on' and need(gradient_checkpointing='on')['kept'] < need(gradient_checkpointing='off')['kept']
    assert need(max_tokens_per_microbatch=4096)['tokens'] == 4096
    assert fixed(need(bf16=False, lora_rank=8)) > 1.8*fixed(need(lora_rank=8))


@pytest.mark.parametrize('name', CURRICULA)
def test_every_preset_can_be_planned(name):
    p = read_preset(name)
    plan = estimate.make_plan(p)
    text = estimate.plan_text(p, plan)
    assert set(plan['stages']) >= {'2_stage1_alignment', '3_stage2_tuning'} and 'DOES NOT FIT' not in text
    assert all(s['hours'] is None or 0 < s['hours'] < 100 for s in plan['stages'].values())
    if name in LARGE:
        assert all('computed' in s['source'] or 'measured' in s['source'] for s in plan['stages'].values())
        for path, how in plan['missing'].items(): assert path in text and how in text
        assert plan['disk']['downloads'] > (1 if name in GPU else .1)


def laptop(bf16=True, **change):
    "What the stages of the preset `laptop` take in all processes together, in MiB."
    p = read_preset('laptop')
    plan = {s: v | {k: x for k, x in change.items() if k in v} for s, v in plan_run(p, 'laptop').items()}
    needs = estimate.memory_needs(estimate.meta_model(estimate.real_config(p)), p, plan, bf16)
    return {s: 1024*m['total'] for s, m in needs.items()}


@pytest.mark.parametrize('step, measured', [('2_stage1_alignment', 6966), ('3_stage2_tuning', 11386), ('3b_vqa_tuning', 11104)])
def test_memory_of_all_processes_is_what_a_run_took(step, measured):
    "Peaks of the sum of proportional set sizes over all processes, in MiB, while the preset ran on two cores in bfloat16."
    assert abs(laptop()[step]/measured - 1) < .25


def test_memory_follows_processes_and_what_is_kept():
    two, one, twice = laptop(), laptop(threads=1), laptop(threads=1, gradient_checkpointing='on')
    step = '3_stage2_tuning'
    assert twice[step] < one[step] < .8*two[step]
    assert laptop(batch_size=8)[step] > two[step] > laptop(max_tokens_per_microbatch=300)[step] and laptop(lora_rank=8)[step] < two[step]
    assert laptop(patience=1)[step] > two[step] and laptop(bf16=False)[step] > two[step]
    assert 2000 < two['4_evaluation'] < two[step]


def shares(threads):
    "A small training of the shipped base with rows as in the preset tiny; another process looks at its memory."
    from llava_med.train.batches import Collator, encode
    from llava_med.train.launch import train
    from llava_med.train.loop import stage_record
    torch.set_num_threads(1)
    model, processor = load(REPO/'data/base_tiny')
    user = [dict(type='image'), dict(type='text', text='what is it?')]
    chat = lambda k: [dict(role='user', content=user), dict(role='assistant', content='a small nodule '*k)]
    samples = [dict(encode(processor.tokenizer, chat(8 + i % 20), 64), image=0) for i in range(48)]
    collate = Collator(processor.tokenizer.pad_token_id, torch.randn(1, 64, model.config.vision_config.hidden_size))
    stage = stage_record('stage2', batch_size=16, lr=1e-4)
    print('ready', flush=True)
    import tempfile
    with tempfile.TemporaryDirectory() as d: train(model, samples, collate, stage, Path(d), threads=threads, report=lambda r: None)
    row = sum(len(s['input_ids']) for s in samples)/len(samples)
    scored = sum(sum(l >= 0 for l in s['labels']) for s in samples)/len(samples)
    from llava_med.train.footprint import KERNEL, SHELL, machine_memory
    needs = machine_memory(model, '3_stage2_tuning', dict(threads=threads, batch_size=16), round(row), round(scored))
    print('counted', needs['total']*2**30 - SHELL - KERNEL)   # there is no command and no notebook here


@pytest.mark.skipif(not Path('/proc/self/smaps_rollup').exists(), reason='needs /proc, as on Linux')
@pytest.mark.parametrize('threads', [1, 2])
def test_memory_of_a_small_model_is_counted(threads):
    from test_memory import proportional, tree
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'LLAVA_MED_ROOT': str(REPO), 'PYTHONPATH': os.pathsep.join(sys.path)}
    p = subprocess.Popen([sys.executable, '-c', f'import test_estimate; test_estimate.shares({threads})'], stdout=subprocess.PIPE, text=True,
                         env=env, cwd=Path(__file__).parent)
    peak = 0
    try:
        while p.poll() is None:
            peak = max(peak, sum(map(proportional, tree(p.pid))))
            time.sleep(.05)
        counted = float(p.stdout.read().split('counted ')[1])
    finally: p.kill(); p.wait()
    print(f'{threads} processes: counted {counted/2**20:.0f} MiB, at most {peak/2**20:.0f}')
    assert abs(counted/peak - 1) < .25


def test_too_little_memory_is_one_sentence_before_anything_runs(tmp_path, monkeypatch, capsys):
    "With a way that fits where there is one; the explicit word goes on."
    from types import SimpleNamespace
    from llava_med.lab import commands
    p, plan = read_preset('laptop'), plan_run(read_preset('laptop'), 'laptop')
    say = lambda free, plan=plan: estimate.memory_shortage(p, plan, free)
    assert say(64.) == '' and say(7., {}) == ''
    assert re.search(r'^laptop needs about [\d.]+ GiB of memory for 3\w+, all processes together, and 7.0 are free: close other programs, '
                     r'take `--set all.threads=1.*` \(about [\d.]+ GiB, but slower\), or go on with --anyway.$', say(7.))
    assert 'take a smaller preset, or go on with --anyway' in say(1.)
    monkeypatch.setenv('LLAVA_MED_OUTPUTS', str(tmp_path/'outputs'))
    monkeypatch.setattr(commands, 'psutil', SimpleNamespace(virtual_memory=lambda: SimpleNamespace(available=2**29)))
    assert commands.main(['run', 'smoke', '--name', 'x']) == 2
    err = capsys.readouterr().err
    assert 'smoke needs about' in err and '0.5 are free' in err and len(err.strip().splitlines()) == 1 and not (tmp_path/'outputs').exists()
    ran = []
    monkeypatch.setattr(commands, 'run_pipeline', lambda *a, **k: ran.append(a) or {})
    assert commands.main(['run', 'smoke', '--name', 'x', '--anyway']) == 0 and ran


def test_a_plan_says_time_and_memory_of_every_step(monkeypatch, tmp_path):
    monkeypatch.setenv('LLAVA_MED_OUTPUTS', str(tmp_path))
    p = read_preset('laptop')
    plan = estimate.make_plan(p)
    text = estimate.plan_text(p, plan)
    assert all(f'  {s}:' in text for s in plan_run(p, 'laptop')) and text.count('GiB in all processes together =') == 5
    assert re.search(r'in all \d+ min', text) and re.search(r'at most [\d.]+ GiB in all processes together \(3\w*\); [\d.]+ GiB are free here', text)
    assert 'TOO LITTLE' in estimate.plan_text(p, {**plan, 'free': 1.})
    assert 'downloads 572 MB' in text, 'the parts and the set'


def test_a_processor_without_bfloat16_is_told_how_much_longer_it_takes(monkeypatch):
    monkeypatch.setattr(estimate, 'has_bf16', lambda device: False)
    monkeypatch.setattr(estimate, 'processor_speed', lambda bf16: 125.)
    monkeypatch.setattr(estimate.os, 'cpu_count', lambda: 2)
    hours, said = estimate.processor_hours(dict(minutes=60), dict(gflops=500, gflops_bf16=1000), dict(bf16=True, threads=2))
    assert hours == 4 and said.endswith('this processor makes 250 without bfloat16, so it takes 4.0 times as long')
    assert 'times as long' not in estimate.processor_hours(dict(minutes=60), dict(gflops=250, gflops_bf16=1000), dict(bf16=False, threads=2))[1]


def test_what_was_measured_with_other_parameters_does_not_count(monkeypatch, tmp_path):
    monkeypatch.setenv('LLAVA_MED_OUTPUTS', str(tmp_path))
    folder = tmp_path/'laptop/3b_vqa_tuning'
    folder.mkdir(parents=True)
    (folder/'ledger.json').write_text('{"wall_s": 60}')
    (tmp_path/'laptop/run.json').write_text(json.dumps(dict(run='laptop', steps={'3b_vqa_tuning': dict(state='done', parameters=dict(epochs=1))})))
    assert estimate.measured_hours('laptop', '3b_vqa_tuning', dict(epochs=6)) == (None, '')
    assert estimate.measured_hours('laptop', '3b_vqa_tuning', dict(epochs=1))[0] == 1/60


def test_what_a_finished_run_measured_is_preferred(monkeypatch, tmp_path):
    folder = tmp_path/'outputs/small/3_stage2_tuning'
    folder.mkdir(parents=True)
    (folder/'ledger.json').write_text('{"wall_s": 7200}')
    stages = estimate.make_plan(read_preset('small'))['stages']
    assert stages['3_stage2_tuning']['hours'] == 2 and 'outputs/small' in stages['3_stage2_tuning']['source']
    assert 'computed' in stages['2_stage1_alignment']['source']


def test_code_of_the_hub_is_named(tmp_path):
    (tmp_path/'config.json').write_text('{"auto_map": {"AutoModel": "m.M"}}')
    (tmp_path/'m.py').write_text('')
    (tmp_path/'pytorch_model.bin').write_text('')
    assert len(estimate.remote_code(tmp_path)) == 3 and not estimate.remote_code(REPO/'data/base_tiny')


def test_the_evidence_stands_on_its_page():
    page = json.loads((REPO/'nbs/pages/presets.ipynb').read_text(encoding='utf-8'))
    outputs = [o for c in page['cells'] for o in c.get('outputs', [])]
    shown = ''.join(x for o in outputs for x in o['data']['text/markdown'])
    assert relink(estimate.evidence_table(), '..') in shown, 'make readme'
    for name in GPU:
        e = read_preset(name)['evidence']
        assert e['never run'] and not e['measured'] and 'thin' in e['rehearsed'], 'change it when someone has measured it, and this line'
        assert re.match(r'\d{4}-\d\d-\d\d, ', e['rehearsed']) and f"{estimate.real_config(read_preset(name)).image_seq_length} image tokens" in e['rehearsed']
        values = plan_run(read_preset(name), name)
        for k, word in (('lora_rank', 'adapter'), ('packed', 'packed'), ('sharding', 'fsdp')):
            assert any(v.get(k) not in (None, 0, False, 'none') for v in values.values()) == (word in e['rehearsed']), (name, k)


# Thin models

@each
def test_a_thin_base_is_of_the_real_kind(name, tmp_path):
    p, real = read_preset(name), estimate.real_config(read_preset(name))
    model, processor = load(rehearsal.thin_base(p, tmp_path/'base'))
    c, v, t = model.config, model.config.vision_config, model.config.text_config
    assert (v.model_type, t.model_type, v.image_size, c.image_seq_length, c.projector_hidden_act, c.vision_feature_layer, c.vision_feature_select_strategy) == (
        real.vision_config.model_type, real.text_config.model_type, real.vision_config.image_size, real.image_seq_length, real.projector_hidden_act,
        real.vision_feature_layer, real.vision_feature_select_strategy)
    assert t.tie_word_embeddings == real.text_config.tie_word_embeddings and t.num_hidden_layers == 2
    assert t.num_key_value_heads*real.text_config.num_attention_heads == t.num_attention_heads*real.text_config.num_key_value_heads
    turn = [dict(role='user', content=[dict(type='image'), dict(type='text', text='Why?')])]
    text = processor.apply_chat_template(turn, add_generation_prompt=True)
    assert '<image>' in text and {'llava_v0': '### Human:', 'llava_1_5': 'USER:', 'mistral_instruct': '[INST]'}.get(p['model'].get('template'), '<|im_start|>user') in text
    assert ('<im_start><image><im_end>' in text) == bool(p['model'].get('image_ends'))
    ids = processor(text=text, images=torch.zeros(3, 40, 60, dtype=torch.uint8), return_tensors='pt')
    assert int((ids['input_ids'] == c.image_token_id).sum()) == real.image_seq_length
    assert torch.isfinite(model(**ids).logits).all()
    before = {f: f.read_bytes() for f in (tmp_path/'base').iterdir()}
    rehearsal.thin_base(p, tmp_path/'base')
    assert before == {f: f.read_bytes() for f in (tmp_path/'base').iterdir()}
    shutil.rmtree(tmp_path/'base'); rehearsal.thin_base(p, tmp_path/'base')
    assert (tmp_path/'base/model.safetensors').read_bytes() == before[tmp_path/'base/model.safetensors'], 'the same random weights each time'


@each
def test_a_thin_base_trains_for_what_it_is_asked_and_can_stop(name, tmp_path):
    from llava_med.generate.answers import end_ids
    from llava_med.models.templates import prompt_ids
    from llava_med.train.batches import record_samples
    model, processor = load(rehearsal.thin_base(read_preset(name), tmp_path/'base'))
    talk = [{'from': f, 'value': v} for f, v in (('human', '<image>\nWhy?'), ('gpt', 'left'))]
    (s,), _ = record_samples([dict(id='r', image='a.png', conversations=talk)], processor, 1)
    asked, = prompt_ids(processor, ['Why?'], [1])
    assert s['input_ids'][:len(asked)] == asked and s['labels'][len(asked)] >= 0 and s['labels'][-1] in end_ids(model, processor.tokenizer)


def test_a_rehearsal_reads_the_template_of_the_real_run(tmp_path, monkeypatch, capsys):
    "That of the base where it is on this machine; what cannot be trained with fails in the rehearsal."
    p = read_preset('llava15_7b')
    load(rehearsal.thin_base(p, tmp_path/'thin'))
    assert 'wrote no end behind an answer' in capsys.readouterr().out, 'as the checkpoint itself'
    place = next(v['base_model'] for v in plan_run(p, p['name']).values() if v.get('base_model'))
    monkeypatch.setattr(estimate, 'root', lambda: tmp_path)
    (tmp_path/'data').mkdir(); (tmp_path/'data/base_tiny').symlink_to(REPO/'data/base_tiny')
    shutil.copytree(REPO/'data/base_tiny', tmp_path/place)
    assert estimate.real_template(p) == (REPO/'data/base_tiny/chat_template.jinja').read_text()
    (tmp_path/place/'chat_template.jinja').write_text("{{ messages[0]['role'] }}")
    with pytest.raises(UsageError, match='loses the question'): rehearsal.thin_base(p, tmp_path/'other')


@each
def test_a_rehearsal_keeps_what_matters(name):
    p = read_preset(name)
    real, values = plan_run(p, name), rehearsal.rehearsal_values(p, Path('/thin'))
    assert set(values) == set(real)
    for step in values:
        for k in ('lr', 'batch_size', 'max_len', 'lora_rank', 'lora_alpha', 'packed', 'sharding', 'gradient_checkpointing', 'max_tokens_per_microbatch', 'bf16', 'warmup', 'save_s'):
            if step in estimate.STEP_STAGES: assert values[step][k] == real[step][k], (step, k)
        assert values[step].get('base_model', '/thin') == '/thin' and values[step].get('nproc', 1) == min(2, real[step].get('nproc', 1))
        assert not [v for v in values[step].values() if isinstance(v, str) and v.startswith('data/')]
    assert (values['3_stage2_tuning']['start_from'] == '/thin') == name.endswith('one_stage')


def test_parts_are_joined_into_the_real_base(tmp_path, monkeypatch):
    "`llava-med plan PRESET --join`, with thin parts in the place of the downloads."
    p = read_preset('llava_med_v15')
    for x in ('nbs', 'settings.ini'): (tmp_path/x).symlink_to(REPO/x)
    (tmp_path/'data').mkdir(); (tmp_path/'data/base_tiny').symlink_to(REPO/'data/base_tiny')
    done = command(tmp_path, tmp_path/'outputs', 'plan', 'llava_med_v15', '--join')
    assert done.returncode == 2 and 'data/clip_vit_l_336 is not there: `llava-med get clip_vit_l_336`' in done.stderr
    folders = rehearsal._thin_parts(estimate.real_config(p), p, tmp_path)
    for k, f in folders.items(): f.rename(tmp_path/'data'/p['model'][k])
    done = command(tmp_path, tmp_path/'outputs', 'plan', 'llava_med_v15', '--join')
    assert done.returncode == 0, done.stderr
    assert 'mean and deviation are assumed' in done.stdout
    model, processor = load(tmp_path/'data/llava_med_v15_base', dtype='bfloat16')
    assert model.config.image_seq_length == 576 and '[INST]' in processor.chat_template
    assert 'data/llava_med_v15_base' not in estimate.plan_text(p, estimate.make_plan(p)).split('missing')[0]


def test_a_joined_base_is_tried_in_every_way_it_will_be_trained(tmp_path, capsys, monkeypatch):
    "A mixture of experts, a window and a recurrence: what is no path is said, and what cannot be trained is refused before it is written."
    p, trained = read_preset('llava_med_v15'), []
    folders = rehearsal._thin_parts(estimate.real_config(p), p, tmp_path)
    monkeypatch.setattr(rehearsal, 'check_step', lambda model, where, rank, pad: trained.append((where, rank)))
    rehearsal._join(p, folders, tmp_path/'right', 'float32')
    ranks = {v.get('lora_rank', 0) for s, v in plan_run(p, 'x').items() if s in estimate.STEP_STAGES}
    assert {r for _, r in trained} == ranks | {0} and all(w == folders['language_model'] for w, _ in trained)
    monkeypatch.undo()
    from transformers import AutoConfig, AutoModelForCausalLM
    small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    def other(kind, **numbers):
        tok = rehearsal.AutoTokenizer.from_pretrained(folders['language_model'])
        config = AutoConfig.for_model(kind, **{**small, **numbers}, vocab_size=len(tok), bos_token_id=1, eos_token_id=2, pad_token_id=0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folders['language_model'])
        capsys.readouterr()
        return rehearsal._join(p, folders, tmp_path/kind, 'float32')
    assert (other('mixtral', num_local_experts=4, num_experts_per_tok=2)/'config.json').exists() and 'separate samples' not in capsys.readouterr().out
    other('lfm2', layer_types=['conv', 'full_attention'])
    assert 'will train on separate samples: its layers of the kind conv carry a state' in capsys.readouterr().out
    monkeypatch.setattr('llava_med.train.gates.loss_and_gradients', lambda *a, **k: 1/0)
    with pytest.raises(ValueError, match=r"language_model' \(mistral\) cannot be trained: a loss step of two short questions fails"): other('mistral', sliding_window=None)
    assert not (tmp_path/'mistral').exists()


# The whole pipeline on thin models

@pytest.mark.slow
@each
def test_every_large_preset_is_rehearsed(name, tmp_path):
    done = command(REPO, tmp_path, 'run', name, '--rehearse')
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert 'Its numbers mean nothing' in done.stdout and 'strict accuracy' not in done.stdout
    folder = tmp_path/f'{name}-rehearsal'
    record, real = read_json(folder/'run.json'), plan_run(read_preset(name), name)
    assert {s: r['state'] for s, r in record['steps'].items()} == dict.fromkeys(real, 'done') and 'mean nothing' in record['description']
    for step in real:
        nb = nbformat.read(folder/step/f'{step}.ipynb', 4)
        assert not [o for c in nb.cells for o in c.get('outputs', []) if o.output_type == 'error']
        if step in estimate.STEP_STAGES:
            used = record['steps'][step]['parameters']
            for k in ('lr', 'lora_rank', 'packed', 'sharding', 'gradient_checkpointing', 'batch_size', 'max_len'): assert used[k] == real[step][k], (step, k)
            assert used['nproc'] == min(2, real[step]['nproc'])
            if real[step]['lora_rank']: assert read_json(folder/step/'adapter/adapter_config.json')['r'] == real[step]['lora_rank']
            model, _ = load(folder/step/'model')
            assert model.config.image_seq_length == estimate.real_config(read_preset(name)).image_seq_length
            assert list(csv.DictReader(open(folder/step/'losses.csv')))


@pytest.mark.slow
def test_a_rehearsal_goes_on_and_takes_only_what_is_asked(tmp_path):
    words = ('run', 'llava15_7b_lora', '--rehearse', '--only', '1', '2', '--set', '2_stage1_alignment.n_show=1')
    done = command(REPO, tmp_path, *words)
    assert done.returncode == 0 and '[2/2] 2_stage1_alignment: done' in done.stdout, done.stderr
    assert '0 steps run, 2 kept' in command(REPO, tmp_path, *words).stdout
