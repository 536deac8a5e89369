"Fast paths only where they are right: families of language models, masks that are wrong, and models that cannot be trained."
import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForCausalLM

from llava_med.generate import prefix_cache
from llava_med.generate.answers import answer, plain_answer, slow_because
from llava_med.models.anatomy import apart_because, image_token, tower
from llava_med.models.llava import assemble, join, tiny_model
from llava_med.train import batches, gates, packing, stages
from llava_med.train.batches import Collator, encode, record_samples, pack_shared_prefixes
from llava_med.train.gates import check_step, exact_collate, path_gate, prefix_gate, separate_loss
from llava_med.train.loop import Stage, fit
from llava_med.train.objectives import CrossEntropy
from llava_med.train.packing import ApartCollator, PackedCollator, pack_rows, split_row

SIZE = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=0)
HEAD, EXPERTS = dict(head_dim=8), dict(num_local_experts=4, num_experts_per_tok=2)
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, decoder_sparse_step=1)
LINEAR = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8,
              layer_types=['linear_attention', 'full_attention'])
MAMBA = dict(mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1, mamba_chunk_size=8)
LOCAL = dict(sliding_window=12, layer_types=['sliding_attention', 'full_attention'])
EXACT = {
    'llama': ('llama', {}), 'qwen2': ('qwen2', {}), 'qwen3': ('qwen3', HEAD), 'mistral': ('mistral', dict(sliding_window=None)),
    'phi3': ('phi3', {}), 'gemma': ('gemma', HEAD), 'olmo2': ('olmo2', {}), 'smollm3': ('smollm3', dict(no_rope_layer_interval=2)),
    'granite': ('granite', {}), 'mixtral': ('mixtral', EXPERTS), 'qwen2_moe': ('qwen2_moe', dict(MOE, shared_expert_intermediate_size=16)),
    'qwen3_moe': ('qwen3_moe', dict(MOE, **HEAD)), 'olmoe': ('olmoe', MOE), 'phimoe': ('phimoe', dict(EXPERTS, router_jitter_noise=0., input_jitter_noise=0.)), 'gpt_neox': ('gpt_neox', {}),
    'deepseek_v3': ('deepseek_v3', dict(num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, kv_lora_rank=8,
                                        moe_intermediate_size=16, first_k_dense_replace=1, q_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8))}
LEAKY = {
    'mistral with a window': ('mistral', dict(sliding_window=12)), 'qwen2 with windows': ('qwen2', dict(use_sliding_window=True, sliding_window=12, max_window_layers=1)),
    'phi3 with a window': ('phi3', dict(sliding_window=12)), 'gemma2': ('gemma2', dict(HEAD, **LOCAL)), 'gemma3': ('gemma3_text', dict(HEAD, **LOCAL)),
    'cohere2': ('cohere2', LOCAL), 'exaone4': ('exaone4', dict(LOCAL, sliding_window_pattern=2)), 'gpt_oss': ('gpt_oss', dict(HEAD, **EXPERTS, **LOCAL)),
    'llama4': ('llama4_text', dict(HEAD, **EXPERTS, intermediate_size_mlp=64, attention_chunk_size=12, moe_layers=[], no_rope_layers=[1, 0])),
    'lfm2': ('lfm2', dict(layer_types=['conv', 'full_attention'])), 'qwen3_5': ('qwen3_5_text', dict(HEAD, **LINEAR)),
    'qwen3_next': ('qwen3_next', dict(MOE, **HEAD, **LINEAR, shared_expert_intermediate_size=16)),
    'falcon_h1': ('falcon_h1', dict(HEAD, **MAMBA, mamba_d_ssm=32) | dict(mamba_n_heads=4)), 'bamba': ('bamba', dict(MAMBA, attn_layer_indices=[1])),
    'granite hybrid': ('granitemoehybrid', dict(MAMBA, **EXPERTS, layer_types=['mamba', 'attention'], shared_intermediate_size=64)),
    'jamba': ('jamba', dict(num_experts=2, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, mamba_d_state=8, mamba_dt_rank=4)),
    'minimax': ('minimax', dict(HEAD, **EXPERTS, layer_types=['linear_attention', 'full_attention'], block_size=8)),
    'nemotron_h': ('nemotron_h', dict(num_hidden_layers=3, layers_block_type=['mamba', 'attention', 'mlp'], mamba_num_heads=8, mamba_head_dim=8,
                                      ssm_state_size=8, n_groups=1, chunk_size=8, head_dim=8))}
FAMILIES = EXACT | LEAKY


def text_config(name, words):
    kind, numbers = FAMILIES[name]
    return AutoConfig.for_model(kind, **{**SIZE, **numbers, 'vocab_size': words})


def thin(name='llama', seed=0):
    "A thin LLaVA with a language model of a family, and its processor."
    base, processor = tiny_model(image_size=24)
    return assemble(base.config.vision_config, text_config(name, 320), processor, seed=seed), processor


@pytest.fixture(scope='module')
def toy():
    "Samples about two images, several an image, one without; and what makes batches of them."
    model, processor = tiny_model(image_size=24)
    tok, n = processor.tokenizer, model.config.image_seq_length
    said = [(0, 'which side?', 'left or right'), (0, 'is there a nodule in the left lung?', 'no'), (1, 'why?', 'nobody knows why it is there'),
            (0, 'is it small?', 'yes'), (1, 'which organ is shown?', 'lung'), (None, 'what is a nodule?', 'a small mass')]
    def sample(i, q, a):
        parts = [dict(type='text', text=q)]
        if i is not None: parts.insert(0, dict(type='image'))
        return dict(encode(tok, [dict(role='user', content=parts), dict(role='assistant', content=a)], n), image=i)
    features = torch.randn(2, n, model.config.vision_config.hidden_size, generator=torch.Generator().manual_seed(0))
    return [sample(*x) for x in said], tok.pad_token_id, features, model.config.image_token_id


def of_path(toy, pack_by_image, packed):
    "Rows of a path and what makes batches of them."
    samples, pad, features, image = toy
    rows = pack_shared_prefixes(samples, image) if pack_by_image else samples
    return pack_rows(rows, 10**6) if packed else rows, (PackedCollator if packed else Collator)(pad, features)


PATHS = [(True, False), (False, True), (True, True)]


def stepped(model, rows, collate):
    "Loss and gradients as one step of `fit` shows them: a plain step of length one moves each weight by its gradient."
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    stage = Stage('toy', ('projector', 'language_model'), 1., batch_size=len(rows), warmup=0., max_grad_norm=1e9, optimizer='sgd', schedule='constant')
    row, = fit(model, rows, collate, stage)
    return row['loss'], {n: before[n] - p.detach() for n, p in model.named_parameters()}


def truth(model, toy):
    "Mean loss and gradients of samples that `transformers` reads one by one."
    samples, _, features, _ = toy
    model = copy.deepcopy(model).eval()
    total, n = 0., 0
    for s in samples:
        ids, labels = torch.tensor([s['input_ids']]), torch.tensor([s['labels']])
        f = None if s['image'] is None else features[[s['image']]]
        x = batches.embed(model, dict(input_ids=ids) | ({} if f is None else dict(features=f)))
        logits = model(inputs_embeds=x, use_cache=False).logits
        total = total + torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], reduction='sum')
        n += int((labels[0, 1:] != -100).sum())
    (total/n).backward()
    return (total/n).item(), {k: p.grad for k, p in model.named_parameters()}


def equal(got, want, tolerance=1e-5):
    moved = max((got[1][n] - g).abs().max().item() for n, g in want[1].items() if g is not None and 'vision_tower' not in n)
    largest = max(1., max(g.abs().max().item() for g in want[1].values() if g is not None))
    return abs(got[0] - want[0]) < 2*tolerance and moved < tolerance*largest   # the loss is rounded to five digits


# What `fit` really runs

@pytest.mark.parametrize('name', FAMILIES)
def test_a_step_teaches_what_separate_samples_teach(name, toy, capsys):
    model, _ = thin(name)
    want = truth(model, toy)
    for pack_by_image, packed in PATHS:
        capsys.readouterr()
        assert equal(stepped(copy.deepcopy(model), *of_path(toy, pack_by_image, packed)), want), (pack_by_image, packed)
        said = capsys.readouterr().out
        assert ('Rows are taken apart: its' in said) == (name in LEAKY), said


@pytest.mark.parametrize('name', LEAKY)
def test_without_the_gate_it_would_leak(name, toy, monkeypatch):
    "The families are chosen well: each of them teaches something else in shared rows."
    monkeypatch.setattr('llava_med.train.loop.exact_collate', lambda model, samples, collate, measure=True: collate)
    model, _ = thin(name)
    for n, p in model.named_parameters():
        if p.dim() > 1 and 'vision' not in n: p.data.mul_(3)
    assert not equal(stepped(copy.deepcopy(model), *of_path(toy, True, False)), truth(model, toy))


@pytest.mark.parametrize('pack_by_image,packed', PATHS)
def test_an_adapter_is_asked_for_the_model_inside(pack_by_image, packed, toy, capsys):
    from llava_med.models.adapters import add_lora
    stage = Stage('toy', ('language_model',), 1e-2, batch_size=8)
    rows, collate = of_path(toy, pack_by_image, packed)
    leaky, right = (fit(add_lora(thin(n)[0], 2), rows, collate, stage) for n in ('lfm2', 'llama'))
    assert capsys.readouterr().out.count('Rows are taken apart') == 1 and leaky and right


def test_helpers_and_launched_processes_take_rows_apart_too(toy):
    rows, collate = of_path(toy, True, False)
    want = truth(thin('lfm2')[0], toy)
    stage = Stage('toy', ('projector', 'language_model'), 1., batch_size=len(rows), warmup=0., max_grad_norm=1e9, optimizer='sgd', schedule='constant')
    model = thin('lfm2')[0]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    row, = fit(model, rows, collate, stage, grad_workers=2)
    assert equal((row['loss'], {n: before[n] - p for n, p in model.named_parameters()}), want)


# Gates that can fail

def leaks_all(mask): return lambda segments, blocks=None: mask(segments.clamp(max=0), blocks)

def leaks_one_pair(mask):
    def leaky(segments, blocks=None):
        seen = mask(segments, blocks)
        if (segments[0] == 2).any(): seen[0, 0, int((segments[0] == 2).nonzero()[0]), int((segments[0] == 1).nonzero()[0])] = True
        return seen
    return leaky

def hides_the_image(mask): return lambda segments, blocks=None: mask(segments + (segments == 0)*9, blocks)


@pytest.mark.parametrize('wrong', [leaks_all, leaks_one_pair, hides_the_image])
def test_a_wrong_mask_is_caught(wrong, toy, monkeypatch, capsys):
    model, processor = thin()
    assert prefix_gate(model, processor).passed
    monkeypatch.setattr(batches, 'segment_mask', wrong(batches.segment_mask))
    assert not prefix_gate(model, processor).passed
    other = thin()[0]
    want = truth(other, toy)
    assert equal(stepped(other, *of_path(toy, True, False)), want) and 'differ by' in capsys.readouterr().out


def test_positions_that_do_not_restart_are_caught(monkeypatch):
    model, processor = thin()
    right = batches.pack_shared_prefixes
    monkeypatch.setattr(gates, 'pack_shared_prefixes', lambda *a, **k: [dict(r, positions=list(range(len(r['positions'])))) for r in right(*a, **k)])
    assert not prefix_gate(model, processor).passed


def test_wrong_bounds_of_packed_rows_are_caught(monkeypatch):
    model, _ = thin()
    assert path_gate(model, False, True).passed
    right = packing.layout
    monkeypatch.setattr(packing, 'layout', lambda segments, blocks: right(segments*0, blocks*0))
    assert not path_gate(model, False, True).passed and not path_gate(model, True, True).passed


def test_a_model_that_sees_no_image_proves_nothing():
    model, processor = thin()
    with torch.no_grad(): model.model.multi_modal_projector.linear_2.weight.zero_()
    assert 'shows nothing' in prefix_gate(model, processor).why


def test_attention_that_ignores_what_it_is_given_is_no_path(toy, capsys):
    "Sinks are lost in packed rows, and StableLM does not hand the bounds on; sharing is exact for both."
    for name, kind in (('gpt_oss', dict(HEAD, **EXPERTS, layer_types=['full_attention']*2)), ('stablelm', {})):
        base, processor = tiny_model(image_size=24)
        text = AutoConfig.for_model(name, **{**SIZE, **kind, 'vocab_size': 320})
        model = assemble(base.config.vision_config, text, processor)
        assert path_gate(model, True, False).passed
        assert not path_gate(model, False, True).passed and not path_gate(model, True, True).passed
        want = truth(model, toy)
        assert equal(stepped(model, *of_path(toy, True, True)), want) and 'taken apart' in capsys.readouterr().out


def test_a_window_as_long_as_every_sample_hides_nothing(toy, capsys):
    FAMILIES['a wide window'] = 'mistral', dict(sliding_window=80)
    model, processor = thin('a wide window')
    del FAMILIES['a wide window']
    assert 'window of 80 tokens' in apart_because(model) and apart_because(model, 80) is None
    assert prefix_gate(model, processor, longest=80).passed and not prefix_gate(model, processor, longest=81).passed
    want = truth(model, toy)
    assert equal(stepped(model, *of_path(toy, True, True)), want) and 'taken apart' not in capsys.readouterr().out


def test_rows_are_taken_apart_as_they_were_joined(toy):
    samples, pad, features, image = toy
    two = dict(samples[0], input_ids=samples[0]['input_ids'][:6] + samples[0]['input_ids'], labels=[-100]*6 + samples[0]['labels'], image=[1, 0])
    n = samples[0]['input_ids'].count(image)
    two['input_ids'] = [image]*n + samples[0]['input_ids']; two['labels'] = [-100]*n + samples[0]['labels']
    mixed = [dict(s, weights=[.5]*len(s['labels'])) for s in (*samples, two)]
    for pack_by_image in (False, True):
        rows = pack_shared_prefixes([{k: v for k, v in s.items() if k != 'weights'} for s in mixed], image) if pack_by_image else mixed
        for packed in (False, True):
            made = pack_rows(rows, 60) if packed else rows
            back = [s for r in made for s in split_row(r, image, n)]
            key = lambda s: (s['input_ids'], s['labels'][1:], s['image'], s.get('weights'))
            plain = [{k: v for k, v in s.items() if not pack_by_image or k != 'weights'} for s in mixed]
            assert sorted(map(repr, map(key, back))) == sorted(map(repr, map(key, plain))), (pack_by_image, packed)


def test_what_needs_no_gate_is_left_alone(toy):
    samples, pad, features, image = toy
    model, plain = thin('lfm2')[0], Collator(pad, features)
    assert exact_collate(model, samples, plain) is plain
    assert exact_collate(model, pack_shared_prefixes(samples[:1], image), plain) is plain   # a row of one sample
    own = lambda rows: plain(rows)
    assert exact_collate(model, pack_shared_prefixes(samples, image), own) is own
    apart = exact_collate(model, pack_shared_prefixes(samples, image), plain)
    assert isinstance(apart, ApartCollator) and exact_collate(model, pack_shared_prefixes(samples, image), apart) is apart


# A stage

@pytest.fixture
def stage(tmp_path):
    "Records about two images of a stage at work, and the stage."
    for i in range(2): Image.new('RGB', (24, 24), (90*i, 40, 90)).save(tmp_path/f'{i}.png')
    def record(i, q, a, image): return dict(id=f'r{i}', image=image, conversations=[{'from': 'human', 'value': f'<image>\n{q}'}, {'from': 'gpt', 'value': a}])
    records = [record(i, q, a, f'{i % 2}.png') for i, (q, a) in enumerate([('which side?', 'left'), ('why?', 'nobody knows'), ('is it small?', 'yes'), ('where is it?', 'in the lung')])]
    def at_work(name, **settings):
        model, processor = thin(name)
        return SimpleNamespace(model=model, processor=processor, settings=stages.Settings(**settings), objective=CrossEntropy(),
                               start=Path('data/some_base'), step=SimpleNamespace(params=dict(threads=1)), bf16=False)
    return at_work, records, tmp_path, record


@pytest.mark.parametrize('name,pack_by_image,packed,line,kind,n', [
    ('llama', True, False, '', Collator, 2), ('llama', False, True, '', PackedCollator, 4), ('llama', True, True, '', PackedCollator, 2),
    ('lfm2', True, False, 'Without sharing of images: its layers of the kind conv', Collator, 4),
    ('lfm2', False, True, 'Without packed rows: its layers of the kind conv', Collator, 4),
    ('qwen3_5', True, True, 'Without sharing of images and packed rows: its layers of the kind linear_attention', Collator, 4),
    ('gemma2', False, True, 'Without packed rows: its attention sees a window of 12 tokens only', Collator, 4)])
def test_a_stage_says_which_rows_it_takes(stage, capsys, name, pack_by_image, packed, line, kind, n):
    at_work, records, folder, _ = stage
    made = stages.prepare(at_work(name, packed=packed), records, folder, pack_by_image=pack_by_image)
    assert type(made.collate) is kind and len(made.rows) == n
    said = [l for l in capsys.readouterr().out.splitlines() if 'Without' in l]
    assert said == [] if not line else len(said) == 1 and said[0].startswith(line)


def test_packing_gives_way_to_sharing(stage, capsys):
    at_work, records, folder, _ = stage
    work = at_work('llama', packed=True)
    base, processor = tiny_model(image_size=24)
    work.model = assemble(base.config.vision_config, AutoConfig.for_model('stablelm', **{**SIZE, 'vocab_size': 320}), processor)
    made = stages.prepare(work, records, folder, pack_by_image=True)
    assert type(made.collate) is Collator and len(made.rows) == 2
    assert 'Without packed rows: the probe failed (its attention is not told where packed samples begin).' in capsys.readouterr().out


def test_a_question_that_fills_all_is_left_out_and_counted(stage, capsys):
    at_work, records, folder, record = stage
    long = record(9, 'which side? '*400, 'left', '0.png')
    made = stages.prepare(at_work('llama', max_len=200), [*records[:2], long, *records[2:]], folder)
    assert len(made.samples) == 4
    assert "1 of 5 conversations were left out, since no answer begins within 200 tokens (max_len): 'r9'." in capsys.readouterr().out
    with pytest.raises(ValueError, match="'r9'"): stages.prepare(at_work('llama', max_len=200), [long], folder)
    with pytest.raises(ValueError, match="'r9'"): record_samples([*records, long], at_work('llama').processor, 4, 200)   # who counts on every record hears of it
    silent = dict(records[0], id='silent', conversations=records[0]['conversations'][:1])
    with pytest.raises(ValueError, match="'silent'"): stages.prepare(at_work('llama'), [*records, silent], folder)


def test_a_model_that_cannot_be_trained_is_named_before_images_are_read(stage, monkeypatch):
    at_work, records, folder, _ = stage
    work = at_work('llama')
    monkeypatch.setattr(stages, 'cached_features', lambda *a, **k: pytest.fail('images were read'))
    def without_gradient(module, args, out): return out.detach().requires_grad_() if out.isnan().any() else out*float('nan')
    work.model.lm_head.register_forward_hook(without_gradient)
    with pytest.raises(ValueError, match=r"'data/some_base' \(llama\) cannot be trained: its loss is nan; choose another language model"):
        stages.prepare(work, records, folder)


@pytest.mark.parametrize('name', ['mixtral', 'qwen3_moe', 'phimoe', 'gpt_oss', 'lfm2', 'granite hybrid', 'llama'])
def test_a_tiny_step_changes_nothing(name):
    model, _ = thin(name)
    model.model.vision_tower.requires_grad_(False)
    before, learns = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
    check_step(model, 'a/folder', lora_rank=2)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and set(before) == set(model.state_dict())
    assert [p.requires_grad for p in model.parameters()] == learns and not any(p.grad is not None for p in model.parameters())
    assert not hasattr(model, 'peft_config') and not model.training


def test_a_step_that_fails_is_told_with_its_remedy(monkeypatch):
    model, _ = thin()
    def broken(*a, **k): raise RuntimeError('no backward for this kernel\nmore')
    with monkeypatch.context() as m:
        m.setattr(gates, 'loss_and_gradients', broken)
        with pytest.raises(ValueError, match=r"'a/b' \(llama\) cannot be trained: a loss step of two short questions fails \(no backward for this kernel\)"):
            check_step(model, 'a/b')
    monkeypatch.setattr(gates, 'lora_targets', lambda model: 'nothing')
    with pytest.raises(ValueError, match=r"'a/b' \(llama\) cannot be trained with an adapter: .*train its weights \(lora_rank 0\)"):
        check_step(model, 'a/b', lora_rank=4)


def test_a_tower_that_learns_alone_is_no_fault():
    model, _ = thin()
    for n, p in model.named_parameters(): p.requires_grad_('vision_tower' in n)
    check_step(model, 'a/b')


# Joining

def parts(tmp_path, text):
    "A tower and a language model in folders."
    base, processor = tiny_model(image_size=24)
    tower(base).save_pretrained(tmp_path/'tower')
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(text).save_pretrained(tmp_path/'words')
    tok = processor.tokenizer
    tok.chat_template = processor.chat_template
    tok.save_pretrained(tmp_path/'words')
    return str(tmp_path/'tower'), str(tmp_path/'words')


SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
@pytest.mark.parametrize('kind,numbers', [
    ('gpt2', dict(n_embd=32, n_layer=2, n_head=4)), ('gpt_neo', dict(hidden_size=32, num_layers=2, num_heads=4, attention_types=[[['global', 'local'], 1]])),
    ('opt', dict(SMALL, ffn_dim=64, word_embed_proj_dim=32)), ('bloom', dict(hidden_size=32, n_layer=2, n_head=4)), ('falcon', SMALL), ('falcon', dict(SMALL, alibi=True)),
    ('mpt', dict(d_model=32, n_layers=2, n_heads=4)), ('mamba', dict(hidden_size=32, num_hidden_layers=2, state_size=8)),
    ('mamba2', dict(hidden_size=32, num_hidden_layers=2, state_size=8, num_heads=8, head_dim=8, n_groups=1)), ('rwkv', dict(hidden_size=32, num_hidden_layers=2)),
    ('recurrent_gemma', dict(SIZE, lru_width=32, num_hidden_layers=3, block_types=['recurrent', 'recurrent', 'attention']))])
def test_a_language_model_that_does_not_fit_is_refused_in_a_sentence(kind, numbers, tmp_path):
    folders = parts(tmp_path, AutoConfig.for_model(kind, **{**numbers, 'vocab_size': 320, 'bos_token_id': 1, 'eos_token_id': 2}))
    with pytest.raises(ValueError) as error: join(*folders, say=lambda line: None)
    said = str(error.value)
    assert f"'{folders[1]}' ({kind})" in said or f"'{folders[1]}'" in said and 'body' in said
    assert 'choose one of the Llama' in said and '\n' not in said


@pytest.mark.parametrize('name', ['mixtral', 'qwen2_moe', 'qwen3_moe', 'gpt_oss'])
def test_a_joined_mixture_of_experts_trains(name, tmp_path, toy):
    samples, pad, features, _ = toy
    model, _ = join(*parts(tmp_path, text_config(name, 320)), say=lambda line: None)
    rows = fit(model, samples, Collator(pad, features), Stage('stage1', ('projector',), 1e-2, epochs=30, batch_size=6))
    assert rows[-1]['loss'] < rows[0]['loss'] - .01


# Asking

@pytest.mark.parametrize('name', FAMILIES)
def test_asking_and_training_give_the_same_reason(name):
    model, _ = thin(name)
    assert (slow_because(model) is None) == (name in EXACT)
    if name in LEAKY: assert slow_because(model) == apart_because(model)


@pytest.mark.parametrize('name', ['mixtral', 'qwen3_moe', 'deepseek_v3', 'smollm3', 'lfm2', 'gemma2'])
def test_answers_are_those_of_one_question_at_a_time(name, capsys):
    model, processor = thin(name)
    for n, p in model.named_parameters():
        if p.dim() > 1 and 'vision' not in n: p.data.mul_(4)
    image = Image.linear_gradient('L').convert('RGB').resize((24, 24))
    asked = ['which side?', 'is there a nodule in the left lung?', 'why?']
    alone = [plain_answer(model, processor, [image], [q], 6)[0] for q in asked]
    assert answer(model, processor, [image]*3, asked, 6) == alone == plain_answer(model, processor, [image]*3, asked, 6)


def test_a_cache_that_mixes_questions_is_caught(monkeypatch):
    model, right = thin()[0], prefix_cache.visible_keys
    monkeypatch.setattr(prefix_cache, 'visible_keys', lambda own, keys: right(own*0 + 1, keys.clamp(max=1)))
    assert 'differ by' in slow_because(model)
    monkeypatch.undo()
    assert slow_because(thin()[0]) is None


def test_padding_that_a_model_reads_makes_it_answer_one_by_one(monkeypatch, capsys):
    model, processor = thin()
    whole, seen = type(model).generate, []
    def generate(attention_mask, **kw):
        seen.append(len(attention_mask))
        return whole(model, attention_mask=attention_mask*0 + 1, **kw)
    monkeypatch.setattr(model, 'generate', generate, raising=False)
    plain_answer(model, processor, [None]*2, ['why?', 'is there a nodule in the left lung?'], 3)
    assert 'one by one, because padding moves its logits' in capsys.readouterr().out and seen[-2:] == [1, 1]
