"What runs on a GPU only: the table that names it all, and what a processor can execute of it."
import ast
import copy
import json
import os
import re
import time
from importlib.util import find_spec
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import yaml
from peft import LoraConfig
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.data._utils.pin_memory import pin_memory
from transformers import LlavaForConditionalGeneration
from transformers.quantizers.quantizers_utils import should_convert_module

from conftest import REPO
from llava_med.core import runs
from llava_med.evaluate import subjects
from llava_med.lab import estimate, workers
from llava_med.lab.presets import read_preset
from llava_med.models import adapters, segmented_attention
from llava_med.models.adapters import add_lora, attach, base_hash, load_adapter, load_quantised, lora_targets, save_adapter
from llava_med.models.anatomy import connector, decoder, decoder_layers, set_trainable
from llava_med.models.llava import load, save, tiny_model
from llava_med.train import launch as launching
from llava_med.train import footprint, loop, stages
from llava_med.train.batches import Collator, batch_loss, encode, pack_shared_prefixes
from llava_med.train.distributed import Job
from llava_med.train.launch import launch, train
from llava_med.train.loop import Stage, fit
from llava_med.train.memory import checkpointed, free_bytes, step_bytes
from llava_med.models.segmented_attention import layout
from llava_med.train.packing import PackedCollator, pack_rows
from llava_med.train.stages import Settings, begin_stage

TABLE = yaml.safe_load((REPO/'nbs/pipeline/gpu_paths.yaml').read_text(encoding='utf-8'))
PROJECTOR = Stage('toy', ('projector',), 1e-3, epochs=2, batch_size=2)
ALL = Stage('toy', ('projector', 'language_model'), 1e-3, epochs=2, batch_size=2)


# The table

def functions(text):
    "Functions and methods of a source, such as Step.timed → node."
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef): found[node.name] = node
        if isinstance(node, ast.ClassDef):
            found |= {f'{node.name}.{f.name}': f for f in node.body if isinstance(f, ast.FunctionDef)}
    return found


def asks_for_a_gpu(node):
    "Whether a function asks for CUDA, casts or compiles by the device, pins memory, shares weights out or quantises."
    for n in ast.walk(node):
        name = getattr(n, 'attr', getattr(n, 'id', None))
        if name in ('cuda', 'is_cuda', 'fully_shard', 'BitsAndBytesConfig', 'pin_memory'): return True
        if isinstance(n, ast.Constant) and isinstance(n.value, str) and n.value in ('cuda', 'CUDA_VISIBLE_DEVICES'): return True
        if isinstance(n, ast.keyword) and n.arg == 'pin_memory': return True
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute):
            on = getattr(n.func.value, 'id', '')
            if n.func.attr == 'autocast' and not isinstance(n.args[0], ast.Constant): return True
            if n.func.attr == 'compile' and on != 're': return True
    return False


def library_functions():
    "Every function of the library, such as core.runs.Step.timed → node."
    found = {}
    for p in (REPO/'llava_med').rglob('*.py'):
        module = '.'.join(p.relative_to(REPO/'llava_med').with_suffix('').parts)
        found |= {f'{module}.{k}': n for k, n in functions(p.read_text(encoding='utf-8')).items()}
    return found


def test_the_table_names_every_function_that_asks_for_a_gpu():
    there = library_functions()
    named = {w for row in TABLE for w in row['where'] if '/' not in w}
    assert named <= set(there), named - set(there)
    asking = {k for k, n in there.items() if asks_for_a_gpu(n)}
    assert asking <= named, f'{sorted(asking - named)}: name them in nbs/pipeline/gpu_paths.yaml'


def test_what_asks_for_a_gpu_is_found():
    texts = ['x.to("cuda")', 'torch.cuda.synchronize()', 'y = x.is_cuda', 'layer.compile()', 'DataLoader(s, pin_memory=p)',
             'torch.autocast(kind, d)', 'fully_shard(m)', 'os.environ["CUDA_VISIBLE_DEVICES"]']
    for text in texts: assert asks_for_a_gpu(ast.parse(text)), text
    for text in ('re.compile("cuda toolkit")', 'torch.autocast("cpu", d)', 'x.to("cpu")'): assert not asks_for_a_gpu(ast.parse(text)), text


def test_the_tests_of_the_table_exist():
    there = {f'{p.stem}::{name}' for p in (REPO/'tests').glob('test_*.py') for name in functions(p.read_text(encoding='utf-8'))}
    for row in TABLE:
        assert set(row) == {'path', 'where', 'stand_in', 'tests', 'gpu'} and row['where'] and row['stand_in']
        assert row['tests'] and set(row['tests']) <= there, (row['path'], set(row['tests']) - there)
        assert row['gpu'] == 'never' or re.fullmatch(r'\d{4}-\d\d-\d\d, .+', row['gpu']), row['path']
        for w in row['where']: assert '/' not in w or (REPO/f'nbs/{w}.ipynb').exists(), w


def test_nothing_is_said_to_have_run_on_a_gpu_without_a_record():
    "A benchmark's committed results, or a preset's evidence, name the GPU that the table names."
    results = [json.loads(p.read_text()) for p in (REPO/'nbs/benchmarks/results').glob('*.json')]
    names = [r['machine'].get('gpu') for r in results if r.get('machine', {}).get('gpu')]
    said = [row['gpu'] for row in TABLE if row['gpu'] != 'never']
    assert bool(names) == bool(said), 'nbs/pipeline/gpu_paths.yaml and nbs/benchmarks/results differ on whether a GPU was there'
    for s in said: assert any(n.split()[-1] in s or s.split(', ')[1] in n for n in names), s


# What is chosen where there is a GPU: PyTorch's answers are replaced

@pytest.fixture
def gpu(monkeypatch):
    "PyTorch says that there are two GPUs; nothing can be computed on them."
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    return monkeypatch


def test_auto_takes_a_gpu_where_there_is_one(gpu):
    assert str(runs.pick_device('auto')) == 'cuda' and str(runs.pick_device('cuda:1')) == 'cuda:1' and str(runs.pick_device('cpu')) == 'cpu'
    gpu.setattr(torch.cuda, 'is_available', lambda: False)
    gpu.setattr(torch.backends.mps, 'is_available', lambda: False)
    assert str(runs.pick_device('auto')) == 'cpu'
    with pytest.raises(ValueError, match="use 'auto' or 'cpu'"): runs.pick_device('cuda')


def test_processes_of_an_evaluation_take_gpus(gpu):
    gpu.setattr(subjects, 'PartialState', lambda cpu: cpu)
    gpu.setenv('WORLD_SIZE', '2')
    gpu.delenv('ACCELERATE_USE_CPU', raising=False)
    assert subjects._processes() is False
    gpu.setenv('ACCELERATE_USE_CPU', 'true')
    assert subjects._processes() is True
    gpu.delenv('ACCELERATE_USE_CPU')
    gpu.setattr(torch.cuda, 'is_available', lambda: False)
    assert subjects._processes() is True


@pytest.mark.parametrize('name, mfu', [('NVIDIA H200', .5), ('NVIDIA A100-SXM4-40GB', 1.5849), ('a GPU that nobody knows', None)])
def test_the_ledger_of_a_gpu(monkeypatch, name, mfu):
    monkeypatch.setattr(torch.cuda, 'max_memory_allocated', lambda device: 3*2**20)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: name)
    row = runs.ledger_row('cuda', 5, 2, flops=989e12)
    assert row['device'] == name and row['peak_memory_mib'] == 3 and row.get('mfu') == mfu


def test_the_clock_waits_for_the_gpu(monkeypatch):
    "The work is done when the GPU has done it, not when it was asked for."
    monkeypatch.setattr(torch.cuda, 'synchronize', lambda device: time.sleep(.2))
    step = runs.Step('2_stage1_alignment', run='timed', device='cpu')
    with step.timed(): pass
    assert step.device_s < .1
    step.device = torch.device('cuda')
    with step.timed(): pass
    assert step.device_s >= .2
    step.lock.release()


@pytest.mark.parametrize('device, wanted, has, precision', [('cuda', True, True, 'bfloat16'), ('cuda', True, False, 'float32'), ('cuda', False, True, 'float32'),
                                                            ('cpu', True, True, 'float32')])
def test_only_a_gpu_gets_weights_in_bfloat16(monkeypatch, device, wanted, has, precision):
    "And only one that multiplies in it: without autocast, weights of two formats cannot be multiplied."
    asked = []
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation=True: has or including_emulation)
    monkeypatch.setattr(stages, 'load', lambda start, device, precision: asked.append(precision) or tiny_model(image_size=24))
    step = SimpleNamespace(device=torch.device(device), seed=0)
    run = begin_stage(step, PROJECTOR, Settings(bf16=wanted), 'base')
    assert asked == [precision] and run.precision == precision
    if device == 'cuda': assert run.bf16 == (precision == 'bfloat16')


def test_free_memory_of_a_gpu(monkeypatch):
    "What PyTorch holds and does not use counts as free."
    gib = 2**30
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda device: (30*gib, 80*gib))
    monkeypatch.setattr(torch.cuda, 'memory_reserved', lambda device: 25*gib)
    monkeypatch.setattr(torch.cuda, 'memory_allocated', lambda device: 5*gib)
    assert free_bytes('cuda') == 40*gib and free_bytes(torch.device('cuda:1'), share=.5) == 25*gib


def test_a_gpu_is_not_refused_for_want_of_the_processors_memory(gpu):
    assert estimate.shortage_of('tiny', 'new', [], [], free=.01) == ''
    gpu.setattr(torch.cuda, 'is_available', lambda: False)
    assert 'GiB' in estimate.shortage_of('tiny', 'new', [], [], free=.01)


def test_notebooks_of_a_grid_do_not_share_a_gpu(monkeypatch):
    monkeypatch.setattr(workers, 'gpus_here', lambda: ['0', '2', '5'])
    monkeypatch.setattr(workers, 'run_task', lambda job: job['env']['CUDA_VISIBLE_DEVICES'])
    here = workers.LocalExecutor(3, gpus=1)
    first = [here.start(dict(env={})) for _ in range(3)]
    assert sorted(f.result() for f in first) == ['0', '2', '5'] and not here.room()
    freed = here.ended(first[1])
    assert here.start(dict(env={})).result() == freed
    assert workers.LocalExecutor(1, gpus=2).start(dict(env={})).result() == '0,2'


# The loop

@pytest.fixture(scope='module')
def toy():
    "Packed rows and plain samples of a tiny model, and a collator for each."
    model, processor = tiny_model(image_size=24)
    tok, n = processor.tokenizer, model.config.image_seq_length
    chat = lambda w: [dict(role='user', content=[dict(type='image'), dict(type='text', text='which side?')]), dict(role='assistant', content=w)]
    samples = [dict(encode(tok, chat('left'*(1 + i % 3)), n), image=i % 5) for i in range(12)]
    features = torch.randn(5, n, model.config.vision_config.hidden_size, generator=torch.Generator().manual_seed(0))
    rows = pack_rows(pack_shared_prefixes(samples[:9], model.config.image_token_id), 90)   # the fifth image has one sample
    return SimpleNamespace(samples=samples, plain=Collator(tok.pad_token_id, features), rows=rows,
                           packed=PackedCollator(tok.pad_token_id, features))


def mixed(stage):
    "A tiny model as a stage has it on a GPU: in bfloat16, but for what learns."
    model = tiny_model(image_size=24)[0].bfloat16()
    set_trainable(model, stage.trainable)
    for p in model.parameters():
        if p.requires_grad: p.data = p.data.float()
    return model


def apart(a, b): return max(abs(x['loss'] - y['loss']) for x, y in zip(a, b))


class Stay(Job):
    "A job that cannot leave the processor."
    def to(self, device): return self


@pytest.fixture
def dressed(monkeypatch):
    "The loop believes that it is on a GPU; what it asks for is noted, and done on the processor."
    asked, autocast = SimpleNamespace(autocast=[], compiled=[], pinned=[], cpu=[]), torch.autocast
    acc = SimpleNamespace(device=torch.device('cuda'), num_processes=1, process_index=0, is_main_process=True)
    def cast(device_type, dtype=None, enabled=True, **how):
        if dtype is torch.bfloat16: asked.autocast.append((device_type, enabled))
        return autocast('cpu', torch.bfloat16, enabled=enabled, **how)
    make = loop._batches
    monkeypatch.setattr(loop, '_batches', lambda samples, micro, collate, num_workers, pin: asked.pinned.append(pin) or make(samples, micro, collate, num_workers, pin))
    monkeypatch.setattr(loop, 'Accelerator', lambda cpu: asked.cpu.append(cpu) or acc)
    monkeypatch.setattr(loop, 'Job', Stay)
    monkeypatch.setattr(loop, 'send_to_device', lambda batch, device, non_blocking: batch)
    monkeypatch.setattr(torch, 'autocast', cast)
    monkeypatch.setattr(nn.Module, 'compile', lambda self: asked.compiled.append(self))
    return asked


@pytest.mark.parametrize('bf16', [False, True])
def test_a_stage_as_on_a_gpu(toy, dressed, bf16):
    "Every branch of the loop for a GPU; the weights and losses are those of the processor."
    models = [mixed(PROJECTOR) if bf16 else tiny_model(image_size=24)[0] for _ in range(2)]
    there = fit(models[0], toy.rows, toy.packed, PROJECTOR, cpu=False, bf16=bf16, compile=True, grad_workers=2)
    assert dressed.cpu == [False] and dressed.pinned == [True] and set(dressed.autocast) == {('cuda', bf16)}
    assert dressed.compiled == list(decoder_layers(models[0]))
    loop.Accelerator = lambda cpu: SimpleNamespace(device=torch.device('cpu'), num_processes=1, process_index=0, is_main_process=True)
    here = fit(models[1], toy.rows, toy.packed, PROJECTOR, bf16=bf16, compile=True)
    assert dressed.pinned == [True, False] and len(dressed.compiled) == len(decoder_layers(models[0]))
    assert there[-1]['loss'] < there[0]['loss'] and apart(there, here) < (2e-2 if bf16 else 1e-5)


def test_autocast_changes_little_and_something(toy, capsys):
    "One step in bfloat16 against 32 bits, on weights that are as on a GPU; what learns stays in 32 bits."
    once = Stage('toy', ('projector',), 1e-3, epochs=1, batch_size=12)
    whole, half = tiny_model(image_size=24)[0], mixed(once)
    a, b = (fit(m, toy.samples, toy.plain, once, bf16=m is half)[0]['loss'] for m in (whole, half))
    with capsys.disabled(): print(f'\nloss in 32 bits {a:.5f}, under autocast {b:.5f}: {b - a:+.5f}')
    assert 0 < abs(a - b) < .01*a
    kinds = {n: p.dtype for n, p in half.named_parameters()}
    assert {d for n, d in kinds.items() if 'projector' in n} == {torch.float32} and torch.bfloat16 in kinds.values()
    with pytest.raises(RuntimeError, match='dtype'): fit(mixed(once), toy.samples, toy.plain, once)   # so nothing but autocast joins them


def test_the_attention_of_a_gpu_is_that_of_a_processor(toy, monkeypatch):
    calls, real = [], segmented_attention.F.scaled_dot_product_attention
    monkeypatch.setattr(segmented_attention.F, 'scaled_dot_product_attention', lambda *a, **k: calls.append(1) or real(*a, **k))
    batch = toy.packed(toy.rows)
    found = []
    for cuda in (False, True):
        model = tiny_model(image_size=24)[0].train()
        set_trainable(model, ALL.trainable)
        model.set_attn_implementation({'text_config': 'segmented'})
        with monkeypatch.context() as m:
            if cuda: m.setattr(torch.Tensor, 'is_cuda', True, raising=False)
            loss, _ = batch_loss(model, batch)
        loss.backward()
        found.append((loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]), len(calls)))
        calls.clear()
    (a, g, many), (b, h, few) = found
    assert few < many and abs(a - b) < 1e-5*a and float((g - h).norm()/g.norm()) < 1e-5


def test_a_packed_batch_survives_pinning(toy, monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, 'pin_memory', lambda self, *a: pinned.append(self) or self.clone())
    batch = toy.packed(toy.rows[:2])
    again = pin_memory(batch)
    assert len(pinned) == sum(isinstance(v, torch.Tensor) for v in batch.values()) and set(again) == set(batch)
    model = tiny_model(image_size=24)[0]
    model.set_attn_implementation({'text_config': 'segmented'})
    assert batch_loss(model, again)[0] == batch_loss(model, batch)[0]


COMPILERS = [pytest.param('aot_eager', id='traced'), pytest.param('inductor', id='generated', marks=pytest.mark.slow)]

@pytest.mark.parametrize('backend', COMPILERS)
@pytest.mark.parametrize('packed', [False, True])
def test_compiled_layers_take_the_same_step(toy, backend, packed):
    "Each layer of the language model compiled, as `fit` does on a GPU."
    if backend == 'inductor':
        from torch._inductor.cpp_builder import get_cpp_compiler
        try: get_cpp_compiler()
        except Exception: pytest.skip('no C++ compiler is installed (Debian: apt install g++)')
    found = []
    torch._dynamo.utils.counters.clear()
    for compiled in (False, True):
        model = tiny_model(image_size=24)[0].train()
        set_trainable(model, ALL.trainable)
        if packed: model.set_attn_implementation({'text_config': 'segmented'})
        if compiled:
            for layer in decoder_layers(model): layer.compile(backend=backend)
        loss, _ = batch_loss(model, (toy.packed(toy.rows[:2]) if packed else toy.plain(toy.samples[:4])))
        loss.backward()
        found.append((loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] > 0, 'nothing was compiled'
    torch._dynamo.reset()
    (a, g), (b, h) = found
    assert abs(a - b) < 1e-5*a and float((g - h).norm()/g.norm()) < 1e-4


# Several processes

def test_more_processes_than_gpus_are_refused(toy, gpu, tmp_path):
    with pytest.raises(ValueError, match='3, but there are 2 GPUs'):
        launch(3, tmp_path/'job', tiny_model(image_size=24)[0], toy.samples, toy.plain, ALL, cpu=False)


@pytest.mark.parametrize('cpu', [False, True])
def test_launched_processes_see_the_gpus_and_have_them_alone(toy, gpu, tmp_path, cpu):
    "The notebook's model leaves the first GPU before they start, and comes back whatever happens to them."
    model, moves, seen = tiny_model(image_size=24)[0], [], {}
    gpu.setattr(type(model), 'to', lambda self, device: moves.append(str(device)) or self)
    gpu.setenv('CUDA_VISIBLE_DEVICES', '4,6')
    gpu.delenv('ACCELERATE_USE_CPU', raising=False)
    def start(words, env, **how):
        seen.update(env=env, words=words, moves=list(moves))
        raise RuntimeError('it did not start')
    gpu.setattr(launching.subprocess, 'Popen', start)
    with pytest.raises(RuntimeError, match='did not start'):
        launch(2, tmp_path/'job', model, toy.samples, toy.plain, ALL, cpu=cpu)
    assert seen['moves'] == ['cpu'] and len(moves) == 2
    assert seen['env']['CUDA_VISIBLE_DEVICES'] == ('' if cpu else '4,6') and ('ACCELERATE_USE_CPU' in seen['env']) == cpu
    assert seen['words'][seen['words'].index('--nproc_per_node') + 1] == '2'


def test_shared_weights_of_two_formats_agree_with_one_process(toy, tmp_path):
    "FSDP over gloo as stage 2 has it on GPUs: a tower in bfloat16, what learns in 32 bits, autocast, packed rows."
    one, two = mixed(ALL), mixed(ALL)
    a = fit(one, toy.rows, toy.packed, ALL, bf16=True)
    b = launch(2, tmp_path/'job', two, toy.rows, toy.packed, ALL, sharding='fsdp', bf16=True)
    assert len(a) == len(b) and apart(a, b) < .02*a[0]['loss'] and a[-1]['loss'] < a[0]['loss']
    start = mixed(ALL)
    moved, off = (torch.cat([(p.detach() - q.detach()).float().flatten() for p, q in zip(one.parameters(), m.parameters())]).norm() for m in (start, two))
    assert off < .1*moved and {p.dtype for p in two.parameters() if p.requires_grad} == {torch.float32}


# Memory

def test_memory_is_measured_on_what_will_learn(toy, tmp_path, monkeypatch):
    "In 32 bits, as it trains, and not in the bfloat16 in which a GPU gets it."
    found = {}
    def plan(model, *args, **how):
        found.update({n: p.dtype for n, p in model.named_parameters() if p.requires_grad})
        raise InterruptedError
    monkeypatch.setattr(launching, 'plan_memory', plan)
    for rank in (0, 4):
        with pytest.raises(InterruptedError): train(tiny_model(image_size=24)[0].bfloat16(), toy.samples, toy.plain, ALL, tmp_path, lora_rank=rank)
        assert found and set(found.values()) == {torch.float32}
        found.clear()


SHAPES = FakeTensorMode(allow_non_fake_inputs=True)   # tensors with a shape and no values

def without_values(preset, layers, kind, bf16, rank):
    "The model of a preset at full width with a few layers, as it trains, without a byte of weights."
    config = copy.deepcopy(estimate.real_config(read_preset(preset)))
    config.text_config.num_hidden_layers = layers
    config.vision_config.num_hidden_layers, config.vision_feature_layer = 1, -1
    torch.set_default_dtype(torch.bfloat16 if bf16 else torch.float32)
    try:
        with torch.device('meta'): model = LlavaForConditionalGeneration(config)
    finally: torch.set_default_dtype(torch.float32)
    set_trainable(model, ('projector', 'language_model') if kind == 'full' else ('projector',))
    if kind == 'adapter':
        with torch.device('meta'): model = attach(model, LoraConfig(r=rank, target_modules=lora_targets(model))).get_base_model()
    for m in model.modules():
        for k, p in m._parameters.items():
            if p is None: continue
            value = p.detach().float() if p.requires_grad else p.detach()
            m._parameters[k] = nn.Parameter(FakeTensor(SHAPES, value, torch.device('cpu')), p.requires_grad)
        for k, b in m._buffers.items():
            if b is not None: m._buffers[k] = FakeTensor(SHAPES, b.to('meta'), torch.device('cpu'))
    model.set_attn_implementation({'text_config': 'segmented'})
    return model.train()


def kept(preset, layers, tokens, kind, bf16, rank, again=False):
    "Bytes that the decoder keeps of one row for the backward pass."
    model = without_values(preset, layers, kind, bf16, rank)
    one = torch.zeros(1, tokens, dtype=torch.long)
    row = layout(one, one)
    def loss(model, batch):
        x = model.get_input_embeddings()(batch['ids'])
        x = x + 0*connector(model).linear_2.bias.sum().to(x.dtype)   # it has a gradient, as behind a projector
        out = decoder(model)(inputs_embeds=x, position_ids=batch['at'], use_cache=False, layout=row).last_hidden_state
        return out.float().sum(), tokens
    on_a_gpu = mock.patch.object(segmented_attention, '_computes_bf16', lambda x: False)
    with SHAPES, on_a_gpu, checkpointed(model, again):
        batch = dict(ids=torch.zeros(1, tokens, dtype=torch.long), at=torch.arange(tokens)[None])
        return step_bytes(model, batch, loss, bf16=bf16)[0]


def learns_in_a_layer(preset, kind, rank):
    "Weights of matrices that learn in one layer."
    few, many = (without_values(preset, k, kind, True, rank) for k in (1, 2))
    count = lambda m: sum(p.numel() for p in decoder(m).parameters() if p.requires_grad and p.dim() > 1)
    return count(many) - count(few)


@pytest.mark.parametrize('kind, bf16', [('frozen', True), ('adapter', True), ('full', True)])
@pytest.mark.parametrize('preset', ['llava_med_v15', 'llava15_7b'])
def test_the_plan_keeps_what_a_layer_of_full_width_keeps(preset, kind, bf16):
    "Bytes of a token and a layer, and the copies in bfloat16 of what learns."
    text = estimate.real_config(read_preset(preset)).text_config
    of_a_layer = {t: kept(preset, 2, t, kind, bf16, 64) - kept(preset, 1, t, kind, bf16, 64) for t in (512, 1024)}
    each = (of_a_layer[1024] - of_a_layer[512])/512
    copies = of_a_layer[512] - 512*each
    planned = footprint.autocast_bytes(text, kind, 64)
    print(f'{preset}, {kind}: {each:,.0f} bytes a token and layer, planned {planned:,}; copies {copies:,.0f}')
    assert abs(each/planned - 1) < .005
    assert abs(copies - 2*bf16*learns_in_a_layer(preset, kind, 64)) <= .001*copies


@pytest.mark.parametrize('kind', ['adapter', 'full'])
def test_a_plan_with_checkpointing_keeps_the_inputs_of_layers(kind):
    text = estimate.real_config(read_preset('llava15_7b')).text_config
    grown = {t: kept('llava15_7b', 2, t, kind, True, 64, True) - kept('llava15_7b', 1, t, kind, True, 64, True) for t in (512, 1024)}
    assert (grown[1024] - grown[512])/512 == text.hidden_size*(4 if kind == 'full' else 2)
    model = estimate.meta_model(estimate.real_config(read_preset('llava15_7b')))
    said = [footprint.stage_memory(model, '3_stage2_tuning', dict(lora_rank=64*(kind == 'adapter'), gradient_checkpointing='on', max_tokens_per_microbatch=t), dict(gpus=1, memory_gb=80), 926, 250)
            for t in (2048, 4096)]
    grows = (said[1]['kept'] - said[0]['kept'])*2**30/2048
    one, head = footprint.autocast_bytes(text, kind, 64), 250/926*text.vocab_size*10
    assert abs(grows - text.num_hidden_layers*text.hidden_size*(4 if kind == 'full' else 2) - one - head) < 2


# Four bits

NF4 = torch.tensor([-1.0, -.6961928, -.52507305, -.39491749, -.28444138, -.18477343, -.09105004, 0.0, .0795803, .1609302, .2461123, .33791524,
                    .44070983, .562617, .72295684, 1.0])   # quantiles of a normal distribution (QLoRA, appendix E)


def rounded(w):
    "Weights rounded to NF4, 64 of them to a scale."
    blocks = w.detach().float().reshape(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True).clamp_min(1e-12)
    return (NF4[((blocks/scale)[..., None] - NF4).abs().argmin(-1)]*scale).view(w.shape).to(w.dtype)


def stand_in(path, quantization_config, device_map, dtype, trust_remote_code=False):
    "What `from_pretrained` gives with bitsandbytes, with rounded weights in the place of packed ones."
    how = quantization_config
    assert how.load_in_4bit and how.bnb_4bit_quant_type == 'nf4' and device_map == {'': 'cpu'}
    assert not trust_remote_code
    model = LlavaForConditionalGeneration.from_pretrained(path, dtype=dtype)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and should_convert_module(name, how.llm_int8_skip_modules):
            layer.weight = nn.Parameter(rounded(layer.weight), requires_grad=False)
    return model


def installed(monkeypatch, is_there):
    "The chapter's code believes that bitsandbytes is installed, or not."
    monkeypatch.setattr(adapters, 'importlib', SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: name if is_there else None)))


bitsandbytes = pytest.mark.skipif(not find_spec('bitsandbytes'), reason='bitsandbytes is not installed (pip install bitsandbytes)')
WAYS = ['stand_in', pytest.param('bitsandbytes', marks=bitsandbytes)]

@pytest.fixture
def coarse(tmp_path, monkeypatch, request):
    "A tiny LLaVA in a folder, and the same read in 4 bits."
    model, processor = tiny_model(width=64, image_size=24)   # bitsandbytes rounds 64 weights of a row together
    save(model, processor, tmp_path/'base')
    if request.param == 'stand_in':
        installed(monkeypatch, True)
        monkeypatch.setattr(adapters, 'AutoModelForImageTextToText', SimpleNamespace(from_pretrained=stand_in))
    return tmp_path/'base', load_quantised(tmp_path/'base', device='cpu')[0].train()


@pytest.mark.parametrize('coarse', WAYS, indirect=True)
def test_an_adapter_on_4_bits(coarse, toy, tmp_path):
    "What is coarse stays, what learns does, and the adapter fits the whole base."
    folder, model = coarse
    whole = load(folder, dtype='bfloat16')[0]
    assert model.base_record['base'] == base_hash(whole) and {p.dtype for p in connector(model).parameters()} == {torch.float32}
    same = dict(whole.named_parameters())
    assert all(torch.equal(p, same[n]) for n, p in model.named_parameters() if 'vision_tower' in n or 'lm_head' in n)
    ids = torch.tensor([toy.samples[0]['input_ids'][-12:]])
    with torch.no_grad(): a, b = (m(input_ids=ids).logits.float() for m in (whole, model))
    assert 1e-2 < (a - b).norm()/a.norm() < .5, 'coarser than bfloat16, and still the same model'
    adapted = add_lora(model, 4)
    frozen = {n: p.detach().clone() for n, p in adapted.named_parameters() if not p.requires_grad}
    features = torch.randn(5, model.config.image_seq_length, 64, generator=torch.Generator().manual_seed(0))
    collate = Collator(toy.plain.pad_id, features)
    rows = fit(adapted, toy.samples, collate, Stage('toy', ('projector', 'language_model'), 1e-2, epochs=4, batch_size=4), bf16=True)
    assert rows[-1]['loss'] < rows[0]['loss'] - .5
    assert all(torch.equal(p, frozen[n]) for n, p in adapted.named_parameters() if n in frozen)
    again = load_adapter(load(folder)[0], save_adapter(adapted, tmp_path/'adapter'))   # its hash is that of the whole base
    with torch.no_grad(): total, n = batch_loss(again.get_base_model(), collate(toy.samples))
    assert abs(float(total)/n - rows[-1]['loss']) < .5*(rows[0]['loss'] - rows[-1]['loss']), 'the whole base has learned most of it, too'


def test_4_bits_without_a_gpu_or_a_package_cost_one_sentence(tmp_path, monkeypatch):
    installed(monkeypatch, False)
    with pytest.raises(ValueError, match='pip install bitsandbytes'): load_quantised(tmp_path)
    installed(monkeypatch, True)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(ValueError, match="needs a GPU, and there is none here; take device='cpu'"): load_quantised(tmp_path)


def test_a_model_in_4_bits_is_not_launched(toy, tmp_path):
    model = add_lora(tiny_model(image_size=24)[0], 2)
    model.get_base_model().is_loaded_in_4bit = True
    with pytest.raises(ValueError, match='4 bits .* set nproc to 1'): launch(2, tmp_path/'job', model, toy.samples, toy.plain, ALL)
    assert not (tmp_path/'job').exists()


@bitsandbytes
def test_nf4_is_that_of_bitsandbytes():
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    w = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    theirs = dequantize_4bit(*quantize_4bit(w, quant_type='nf4', blocksize=64))
    assert (theirs - rounded(w)).abs().max() < 1e-5 < (w - theirs).abs().max()
