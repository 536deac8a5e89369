"Checkpoints written here in exactly the layouts of LLaVA 1.x and LLaVA-Med, converted, and held against the original forward pass."
import json
import re
from itertools import product
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import (AutoConfig, AutoModelForCausalLM, CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, LlavaConfig,
                          LlavaForConditionalGeneration, MistralConfig, MistralForCausalLM)
from transformers.utils import logging

from llava_med.lab.commands import main
from llava_med.models.convert import add_base, convert, convert_vit, convert_weights, own_tower, read_weights, strange_fields, text_config
from llava_med.models.anatomy import disk_name
from llava_med.models.llava import join, load, read_tower, save, train_tokenizer, weights_hash

logging.set_verbosity_error()
WIDE = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0)
SIGHT = dict(hidden_size=128, intermediate_size=192, num_hidden_layers=3, num_attention_heads=2, image_size=48, patch_size=12)
SETTINGS = {'llava_mistral': ('LlavaMistralForCausalLM', 'mlp2x_gelu'), 'llava_llama': ('LlavaLlamaForCausalLM', 'mlp2x_gelu'), 'llava': ('LlavaLlamaForCausalLM', None)}


def words():
    "A tokenizer that has never met a picture."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tok.train_from_iterator(['a small nodule in the left lung'], trainers.BpeTrainer(vocab_size=290, special_tokens=['<unk>', '<s>', '</s>'], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=tok, unk_token='<unk>', bos_token='<s>', eos_token='</s>')


def clip(seed): torch.manual_seed(seed); return stir(CLIPVisionModel(CLIPVisionConfig(**SIGHT))).eval()


def stir(model):
    "Weights of visible size, so that no part is silent; norms near one, as in trained models."
    with torch.no_grad():
        for n, p in model.named_parameters(): p.copy_(torch.randn_like(p)*.15 + ('norm' in n and 'weight' in n))
    return model


def write(folder, state, shards, kind):
    "One file or shards with an index, as safetensors or pickles."
    stem, put = ('model', lambda s, f: save_file(s, f, {'format': 'pt'})) if kind == 'safetensors' else ('pytorch_model', torch.save)
    names = list(state)
    if shards == 1: put(state, folder/f'{stem}.{kind}'); return
    part = [names[i::shards] for i in range(shards)]
    file = {i: f'{stem}-{i + 1:05d}-of-{shards:05d}.{kind}' for i in range(shards)}
    for i, ns in enumerate(part): put({n: state[n] for n in ns}, folder/file[i])
    index = {'metadata': {}, 'weight_map': {n: file[i] for i, ns in enumerate(part) for n in ns}}
    (folder/f'{stem}.{kind}.index.json').write_text(json.dumps(index))


class Original:
    "A checkpoint as the original code left it, and what that code did with a picture and a text."
    def __init__(self, folder, kind='llava_mistral', own=True, shards=2, files='safetensors', extra=(), **settings):
        torch.manual_seed(7)
        self.folder, self.kind, self.linear = Path(folder), kind, kind == 'llava'
        tok = words()
        if self.linear: tok.add_tokens(['[PAD]', '<im_patch>', '<im_start>', '<im_end>'], special_tokens=True)
        self.tok, cls, config = tok, *((MistralForCausalLM, MistralConfig) if 'mistral' in kind else (LlamaForCausalLM, LlamaConfig))
        theta = 1e6 if 'mistral' in kind else 1e4
        kw = {**WIDE, 'vocab_size': len(tok), 'rms_norm_eps': 1e-5, **({'sliding_window': None} if 'mistral' in kind else {})}
        self.lm = stir(cls(config(**kw, rope_parameters={'rope_type': 'default', 'rope_theta': theta}))).eval()
        self.tower = clip(1)
        self.p = [torch.randn(64, 128)*.1, torch.randn(64)*.1, torch.randn(64, 64)*.1, torch.randn(64)*.1]
        state = {n: v.clone() for n, v in self.lm.state_dict().items()}
        for i in range(3): state[f'model.layers.{i}.self_attn.rotary_emb.inv_freq'] = torch.ones(8)
        names = ['model.mm_projector.weight', 'model.mm_projector.bias'] if self.linear else \
            [f'model.mm_projector.{i}.{k}' for i in (0, 2) for k in ('weight', 'bias')]
        state |= dict(zip(names, (p.clone() for p in self.p)))
        if own: state |= {f'model.vision_tower.vision_tower.vision_model.{n}': v.clone() for n, v in self.tower.state_dict().items()}
        if own: state['model.vision_tower.vision_tower.vision_model.embeddings.position_ids'] = torch.arange(17)[None]
        state |= dict(extra)
        architecture, projector = SETTINGS[kind]
        self.config = {**kw, 'model_type': kind, 'architectures': [architecture], 'rope_theta': theta, 'mm_vision_tower': 'openai/clip-vit-tiny',
                       'mm_hidden_size': 128, 'mm_vision_select_layer': -2, 'tie_word_embeddings': False, 'torch_dtype': 'float32', 'use_cache': True,
                       'transformers_version': '4.28.0.dev0'}
        if self.linear: self.config |= dict(mm_use_im_start_end=True, use_mm_proj=True, pad_token_id=-1, bos_token_id=0, eos_token_id=1)
        else: self.config |= dict(mm_projector_type=projector, mm_vision_select_feature='patch', image_aspect_ratio='pad', mm_use_im_start_end=False)
        self.config |= settings
        self.config = {k: v for k, v in self.config.items() if v != 'absent'}
        self.state, self.files, self.shards = state, files, shards
        self.put()

    def put(self, state=None):
        self.folder.mkdir(parents=True, exist_ok=True)
        for f in [*self.folder.glob('*model*')]: f.unlink()
        write(self.folder, state or self.state, self.shards, self.files)
        (self.folder/'config.json').write_text(json.dumps(self.config))
        self.tok.save_pretrained(self.folder)
        return self

    @torch.no_grad()
    def logits(self, pixels, before, after, tower=None):
        "The original forward pass: words, then the second last layer of the tower without its class vector, projected, then words."
        x = (tower or self.tower)(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        x = F.linear(x, self.p[0], self.p[1])
        if not self.linear: x = F.linear(F.gelu(x), self.p[2], self.p[3])
        words = self.lm.model.embed_tokens
        if self.linear:   # v1.0: a start and an end token stay, the patch tokens between them are overwritten
            start, patch, end = self.tok.convert_tokens_to_ids(['<im_start>', '<im_patch>', '<im_end>'])
            ids = torch.tensor([*before, start, *[patch]*x.shape[1], end, *after])
            row = words(ids); row[len(before) + 1:len(before) + 1 + x.shape[1]] = x[0]
        else: row = torch.cat([words(torch.tensor(before)), x[0], words(torch.tensor(after))])   # the mark -200 is cut out
        return self.lm(inputs_embeds=row[None]).logits[0]


@torch.no_grad()
def ours(folder, original, text=('Look at', 'Where is it?')):
    "Logits of the converted model and of the original, for the same picture and text."
    model, processor = load(folder)
    mark = '<im_start><image><im_end>' if original.linear else '<image>'
    picture = Image.linear_gradient('L').convert('RGB').resize((90, 60))
    q = processor(images=picture, text=text[0] + mark + text[1], return_tensors='pt')
    ids = [processor.tokenizer(t, add_special_tokens=False)['input_ids'] for t in text]
    return model(**q).logits[0, :, :len(original.tok)], q['pixel_values'], ids, model, processor


KINDS = {'v1.5': dict(kind='llava_mistral', shards=3), '1.5 in pickles': dict(kind='llava_llama', own=False, files='bin', shards=2),
         '1.5 in one file': dict(kind='llava_llama', own=False, shards=1), 'v1.0': dict(kind='llava', own=False, files='bin', shards=1)}


@pytest.mark.parametrize('name', KINDS)
def test_logits_are_those_of_the_original_forward_pass(name, tmp_path):
    original = Original(tmp_path/'src', **KINDS[name])
    own = KINDS[name].get('own', True)
    if not own: original.tower.save_pretrained(tmp_path/'clip')
    said = []
    convert(tmp_path/'src', tmp_path/'dst', 'own' if own else tmp_path/'clip', say=said.append)
    got, pixels, ids, model, processor = ours(tmp_path/'dst', original)
    want = original.logits(pixels, *ids)
    assert got.shape == want.shape and torch.allclose(got, want, atol=2e-5), float((got - want).abs().max())
    kept = json.loads((tmp_path/'dst/provenance.json').read_text())
    assert kept['vision_tower']['sha256'] == weights_hash(original.tower) == weights_hash(model.model.vision_tower)
    assert processor.image_processor.do_pad == (name != 'v1.0'), 'v1.0 cropped'
    assert any('<image>' in s for s in said) and (tmp_path/'dst/README.md').exists()
    assert model.config.text_config.rope_parameters['rope_theta'] == (1e6 if name == 'v1.5' else 1e4)
    assert (model.generation_config.bos_token_id, model.generation_config.eos_token_id) == (1, 2), "the tokenizer's, not the wrong ones of v1.0"


def test_the_prompt_is_that_of_training(tmp_path):
    turn = [{'role': 'user', 'content': [{'type': 'image'}, {'type': 'text', 'text': 'Where?'}]}]
    for kind, end in (('llava_mistral', '<s>[INST] <image>\nWhere? [/INST]'), ('llava_llama', 'questions. USER: <image>\nWhere? ASSISTANT:'),
                      ('llava', '### Human: <im_start><image><im_end>\nWhere?\n### Assistant:')):
        Original(tmp_path/kind, kind)
        convert(tmp_path/kind, tmp_path/'dst', 'own', say=lambda s: None)
        assert load(tmp_path/'dst')[1].apply_chat_template(turn, add_generation_prompt=True).endswith(end)


def test_which_tower_is_a_choice_that_shows(tmp_path):
    original, stock = Original(tmp_path/'src'), clip(2)
    stock.save_pretrained(tmp_path/'clip')
    logits, hashes = [], []
    for tower, at in (('own', None), (tmp_path/'clip', stock)):
        convert(tmp_path/'src', tmp_path/'dst', tower, say=lambda s: None)
        got, pixels, ids, model, _ = ours(tmp_path/'dst', original)
        assert torch.allclose(got, original.logits(pixels, *ids, tower=at), atol=2e-5)
        kept = json.loads((tmp_path/'dst/provenance.json').read_text())
        logits.append(got); hashes.append(kept['vision_tower']['sha256'])
    assert not torch.allclose(*logits, atol=1e-2)
    assert hashes == [weights_hash(original.tower), weights_hash(stock)]
    assert any('vision_tower' in n for n in kept['left_out']) and str(tmp_path/'clip') == kept['vision_tower']['source']
    with pytest.raises(TypeError): convert(tmp_path/'src', tmp_path/'dst')


def delta(original, folder, rows):
    "The original as a delta onto a base with fewer words."
    base = {n: v + torch.randn_like(v)*.02 for n, v in original.state.items() if 'mm_projector' not in n and 'vision_tower' not in n}
    for n in ('model.embed_tokens.weight', 'lm_head.weight'): base[n] = base[n][:rows].clone()
    folder.mkdir(); torch.save(base, folder/'pytorch_model.bin')
    diff = dict(original.state)
    for n, b in base.items():
        if 'inv_freq' in n: continue
        diff[n] = diff[n].clone(); diff[n][:len(b)] -= b
    return diff


def test_a_delta_onto_its_base(tmp_path):
    original = Original(tmp_path/'src', 'llava', own=False, files='bin', shards=2)
    original.tower.save_pretrained(tmp_path/'clip')
    original.put(delta(original, tmp_path/'base', len(original.tok) - 4))
    with pytest.raises(ValueError, match='looks like a delta'): convert(tmp_path/'src', tmp_path/'dst', tmp_path/'clip')
    convert(tmp_path/'src', tmp_path/'dst', tmp_path/'clip', base=tmp_path/'base', say=lambda s: None)
    got, pixels, ids, *_ = ours(tmp_path/'dst', original)
    assert torch.allclose(got, original.logits(pixels, *ids), atol=5e-5)
    original.put()
    with pytest.raises(ValueError, match='whole model, not a delta'): convert(tmp_path/'src', tmp_path/'dst', tmp_path/'clip', base=tmp_path/'base')


def test_a_delta_onto_another_base(tmp_path):
    original = Original(tmp_path/'src', 'llava', own=False, files='bin')
    diff = delta(original, tmp_path/'base', 200)
    base = read_weights(tmp_path/'base')
    with pytest.raises(ValueError, match='layers.1.mlp.up_proj.weight'): add_base(diff, {n: v for n, v in base.items() if n != 'model.layers.1.mlp.up_proj.weight'})
    with pytest.raises(ValueError, match='only one of them holds model.layers.9'): add_base(diff, {**base, 'model.layers.9.x': torch.zeros(1)})
    with pytest.raises(ValueError, match=r'norm.weight is \(3,\) there and \(64,\) here'): add_base(diff, {**base, 'model.norm.weight': torch.zeros(3)})


# What does not fit is an error that names it, and nothing is written

@pytest.mark.parametrize('change, words', [
    (lambda s: s.update({'model.adapter.weight': torch.zeros(2)}), r'^model.adapter.weight: fits nothing'),
    (lambda s: s.update({'model.mm_projector.4.weight': torch.zeros(2)}), r'mm_projector.4.weight: fits nothing'),
    (lambda s: s.update({'model.vision_tower.vision_tower.vision_model.head.weight': torch.zeros(2)}), r'vision_model.head.weight: fits nothing'),
    (lambda s: s.update({'model.layers.3.mlp.up_proj.weight': torch.zeros(96, 64)}), r'layers.3.mlp.up_proj.weight: fits nothing'),
    (lambda s: s.pop('model.layers.2.mlp.up_proj.weight'), r'layers.2.mlp.up_proj.weight: missing'),
    (lambda s: s.pop('model.mm_projector.2.bias'), r'linear_2.bias: missing'),
    (lambda s: s.pop('model.vision_tower.vision_tower.vision_model.encoder.layers.2.layer_norm1.bias'), r'layer_norm1.bias: missing'),
    (lambda s: s.update({'model.norm.weight': torch.ones(65)}), r'norm.weight \(65,\) instead of \(64,\)'),
    (lambda s: s.update({'model.mm_projector.0.weight': torch.ones(64, 96)}), r'linear_1.weight \(64, 96\) instead of \(64, 128\)'),
    (lambda s: s.pop('model.embed_tokens.weight'), 'projector or an adapter alone'),
    (lambda s: [s.pop(n) for n in list(s) if 'vision_tower' in n], 'holds no CLIP tower .* openai/clip-vit-tiny'),
])
def test_names_and_shapes(change, words, tmp_path):
    original = Original(tmp_path/'src', shards=1)
    change(original.state); original.put()
    with pytest.raises(ValueError, match=words): convert(tmp_path/'src', tmp_path/'dst', 'own', say=lambda s: None)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['src']


@pytest.mark.parametrize('settings, words', [
    (dict(mm_projector_type='mlp3x_gelu'), "projector 'mlp3x_gelu'"), (dict(model_type='llava_mpt'), "type 'llava_mpt'"),
    (dict(mm_vision_select_layer='absent'), 'mm_vision_select_layer'), (dict(image_aspect_ratio='anyres'), 'tiles'),
    (dict(image_aspect_ratio='keep'), "'keep'; say pad or crop"), (dict(vision_config={}), 'already')])
def test_settings_that_have_no_place(settings, words, tmp_path):
    Original(tmp_path/'src', **settings)
    with pytest.raises(ValueError, match=words) as e: convert(tmp_path/'src', tmp_path/'dst', 'own')
    assert '\n' not in str(e.value) and not (tmp_path/'dst').exists()


def test_broken_files(tmp_path):
    original = Original(tmp_path/'src', files='bin', shards=3)
    first, gone = sorted((tmp_path/'src').glob('*.bin'))[:2]
    whole = first.read_bytes()
    first.write_bytes(whole[:500])
    with pytest.raises(ValueError, match='00001-of-00003.bin.* is damaged'): read_weights(tmp_path/'src')
    import collections
    torch.save({'a': torch.zeros(1), 'b': collections.Counter, 'c': Path}, first)
    with pytest.raises(ValueError, match='more than tensors'): read_weights(tmp_path/'src')
    part = torch.load(gone); torch.save({k: v for k, v in part.items() if k != next(iter(part))}, gone); first.write_bytes(whole)
    with pytest.raises(ValueError, match=f'lacks {next(iter(part))}'): read_weights(tmp_path/'src')
    gone.unlink()
    with pytest.raises(FileNotFoundError, match='lacks pytorch_model-00002-of-00003.bin'): read_weights(tmp_path/'src')
    Original(tmp_path/'other', shards=1)
    f = tmp_path/'other/model.safetensors'; f.write_bytes(f.read_bytes()[:700])
    with pytest.raises(ValueError, match='model.safetensors.* is damaged'): read_weights(tmp_path/'other')


def test_no_pickle_runs(tmp_path):
    class Bomb:
        def __reduce__(self): return (Path.touch, (tmp_path/'ran',))
    Original(tmp_path/'src', files='bin', shards=1)
    torch.save({'model.norm.weight': Bomb()}, tmp_path/'src/pytorch_model.bin')
    with pytest.raises(ValueError, match='more than tensors'): read_weights(tmp_path/'src')
    assert not (tmp_path/'ran').exists()


def test_half_precision_stays(tmp_path):
    original = Original(tmp_path/'src')
    original.put({n: v.bfloat16() if v.is_floating_point() else v for n, v in original.state.items()})
    convert(tmp_path/'src', tmp_path/'dst', 'own', say=lambda s: None)
    assert {v.dtype for v in load_file(tmp_path/'dst/model.safetensors').values()} == {torch.bfloat16}
    assert json.loads((tmp_path/'dst/config.json').read_text())['dtype'] == 'bfloat16'
    stock = clip(2); stock.save_pretrained(tmp_path/'clip')
    convert(tmp_path/'src', tmp_path/'dst', tmp_path/'clip', say=lambda s: None)
    kept = json.loads((tmp_path/'dst/provenance.json').read_text())['vision_tower']
    assert kept['sha256_as_read'] == weights_hash(stock) and kept['sha256'] == weights_hash(load(tmp_path/'dst')[0].model.vision_tower) == weights_hash(stock.bfloat16())


def test_a_tokenizer_of_another_model(tmp_path):
    Original(tmp_path/'src', shards=1)
    big = train_tokenizer(['a small nodule'], 400); big.add_tokens([f'w{i}' for i in range(200)]); big.save_pretrained(tmp_path/'tok')
    with pytest.raises(ValueError, match='the checkpoint fewer rows'): convert(tmp_path/'src', tmp_path/'dst', 'own', tokenizer=tmp_path/'tok')


# Language models with settings of their own: what the original computes is what the converted one computes

BASIC = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, bos_token_id=1, eos_token_id=2,
             hidden_act='silu', max_position_embeddings=512, torch_dtype='float32', transformers_version='4.44.0', initializer_range=.3)
LLAMA3 = dict(factor=8., low_freq_factor=1., high_freq_factor=4., original_max_position_embeddings=32)
ROPES = {'llama3': dict(rope_scaling=dict(rope_type='llama3', **LLAMA3), rope_theta=5e5), 'llama3 by 32': dict(rope_scaling=dict(rope_type='llama3', **LLAMA3 | dict(factor=32.)), rope_theta=5e5),
         'older key': dict(rope_scaling=dict(type='linear', factor=4.), rope_theta=1e4), 'linear': dict(rope_scaling=dict(rope_type='linear', factor=2.)),
         'dynamic': dict(rope_scaling=dict(type='dynamic', factor=2.), max_position_embeddings=32),
         'yarn': dict(rope_scaling=dict(rope_type='yarn', factor=4., original_max_position_embeddings=32), max_position_embeddings=128),
         'version 5': dict(rope_parameters=dict(rope_type='llama3', rope_theta=5e5, **LLAMA3)), 'theta alone': dict(rope_theta=1e6), 'nothing': {},
         'biases': dict(attention_bias=True, mlp_bias=True), 'wide heads': dict(head_dim=32), 'eps': dict(rms_norm_eps=.3), 'gelu': dict(hidden_act='gelu')}


class Plain:
    "An original whose language model is any, written as `transformers` 4 wrote it; its tower is inside."
    def __init__(self, folder, kind='llama', tied=False, head=True, tok=None, **text):
        self.folder, self.tok = Path(folder), tok or words()
        self.folder.mkdir(parents=True)
        raw = {**BASIC, 'model_type': kind, 'vocab_size': len(self.tok), 'tie_word_embeddings': tied, **text}
        raw = {k: v for k, v in raw.items() if v != 'absent'}
        torch.manual_seed(5)
        config = AutoConfig.for_model(**{k: v for k, v in raw.items() if k not in ('transformers_version', 'torch_dtype')})
        self.lm = stir(AutoModelForCausalLM.from_config(config)).eval()
        self.lm.tie_weights()
        state = {n: v.clone() for n, v in self.lm.state_dict().items() if n != 'lm_head.weight' or head}
        state |= {f'model.mm_projector.{i}.{k}': torch.randn((64, 128 if i == 0 else 64)[:2 - (k == 'bias')]) for i in (0, 2) for k in ('weight', 'bias')}
        state |= {f'model.vision_tower.vision_tower.vision_model.{n}': v.clone() for n, v in clip(1).state_dict().items()}
        self.config = {**raw, 'model_type': f'llava_{kind.removesuffix("2")}', 'mm_vision_tower': 'openai/clip', 'mm_projector_type': 'mlp2x_gelu',
                       'mm_vision_select_layer': -2, 'image_aspect_ratio': 'pad', 'mm_hidden_size': 128, 'tune_mm_mlp_adapter': False}
        self.state = state
        self.put()

    def put(self):
        write(self.folder, self.state, 1, 'safetensors')
        (self.folder/'config.json').write_text(json.dumps(self.config))
        self.tok.save_pretrained(self.folder)

    @torch.no_grad()
    def agrees(self, folder, n=90):
        "Whether converted and original give the same logits for a text longer than the original context."
        model, ids = load(folder)[0], torch.randint(3, len(self.tok), (1, n), generator=torch.Generator().manual_seed(0))
        a, b = model(input_ids=ids).logits[..., :len(self.tok)], self.lm(input_ids=ids).logits
        assert a.std() > .05
        return torch.allclose(a, b, atol=2e-4), model


def turned(original, folder, **kw):
    said = []
    convert(original.folder, folder, 'own', say=said.append, **kw)
    return said


@pytest.mark.parametrize('name', ROPES)
def test_positions_beyond_the_original_context(name, tmp_path):
    original = Plain(tmp_path/'src', **ROPES[name])
    said = turned(original, tmp_path/'dst')
    same, model = original.agrees(tmp_path/'dst')
    assert same and not any('Kept in' in s for s in said), said
    if 'rope_scaling' in ROPES[name]:
        kept = json.loads((tmp_path/'dst/config.json').read_text())['text_config']
        assert kept['rope_scaling']['factor'] == ROPES[name]['rope_scaling']['factor'], 'older versions read it here'
        plain = Plain(tmp_path/'plain', **{k: v for k, v in ROPES[name].items() if k != 'rope_scaling'})
        turned(plain, tmp_path/'without')
        assert not original.agrees(tmp_path/'without')[0], 'the check can fail'


@pytest.mark.parametrize('kind, text', [('mistral', dict(sliding_window=None)), ('mistral', dict(sliding_window=16)), ('mistral', dict(sliding_window='absent', head_dim=32)),
                                        ('qwen2', {}), ('qwen2', dict(use_sliding_window=True, sliding_window=16, max_window_layers=1)), ('qwen2', dict(rope_theta=1e6, rms_norm_eps=1e-6))])
def test_other_language_models(kind, text, tmp_path):
    original = Plain(tmp_path/'src', kind, **text)
    turned(original, tmp_path/'dst')
    same, model = original.agrees(tmp_path/'dst')
    assert same and model.config.text_config.model_type == kind
    if 'sliding_window' in text and text['sliding_window'] != 'absent' and kind == 'mistral': assert model.config.text_config.sliding_window == text['sliding_window']


def test_settings_that_nothing_reads_are_named(tmp_path):
    original = Plain(tmp_path/'src')
    original.config |= dict(logits_scaling=4., new_setting=1, mm_use_im_patch_token=False, unfreeze_mm_vision_tower=True, _name_or_path='x', quiet=None)
    original.put()
    said = turned(original, tmp_path/'dst')
    assert any(re.search('do(es)? not read them: logits_scaling, new_setting', s) for s in said), said
    assert json.loads((tmp_path/'dst/config.json').read_text())['text_config']['logits_scaling'] == 4.
    assert strange_fields(original.config) == ['logits_scaling', 'new_setting']
    with pytest.raises(ValueError, match='config.json does not describe a language model'): text_config({**original.config, 'hidden_size': 'wide'}, 300)
    with pytest.raises(ValueError, match="scales positions by 'su'"): text_config({**original.config, 'rope_scaling': {'type': 'su', 'factor': 2.}}, 300)


# Tied embeddings

@pytest.mark.parametrize('kind, text', [('llama', ROPES['llama3']), ('qwen2', {})])
@pytest.mark.parametrize('head', [False, True])
def test_tied_embeddings_stay_tied(kind, text, head, tmp_path):
    original = Plain(tmp_path/'src', kind, tied=True, head=head, **text)
    said = turned(original, tmp_path/'dst')
    same, model = original.agrees(tmp_path/'dst')
    assert same and model.lm_head.weight is model.get_input_embeddings().weight
    assert not any('lm_head' in n for n in load_file(tmp_path/'dst/model.safetensors'))
    count = sum(p.numel() for p in model.parameters())
    assert f'{count:,} parameters' in said[-1] or f'{count:,} parameters' in said[-2], (count, said)
    step = torch.optim.SGD(model.parameters(), lr=.1)
    before = model.lm_head.weight.clone()
    model(input_ids=torch.arange(4, 20)[None], labels=torch.arange(4, 20)[None]).loss.backward(); step.step()
    assert model.lm_head.weight is model.get_input_embeddings().weight and not torch.equal(before, model.lm_head.weight)
    save(model, load(tmp_path/'dst')[1], tmp_path/'again')
    again = load(tmp_path/'again')[0]
    assert again.lm_head.weight is again.get_input_embeddings().weight and torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_no_output_layer_and_no_word_of_it(tmp_path):
    original = Plain(tmp_path/'src', head=False)
    with pytest.raises(ValueError, match='lm_head.weight: missing in the checkpoint, and its config.json does not say tie_word_embeddings'): turned(original, tmp_path/'dst')
    tied = Plain(tmp_path/'tied', tied=True)
    tied.state['lm_head.weight'] = tied.state['lm_head.weight'] + 1; tied.put()
    with pytest.raises(ValueError, match='another tensor than the embedding'): turned(tied, tmp_path/'dst')
    assert not (tmp_path/'dst').exists()


def test_a_joined_model_with_tied_embeddings(tmp_path):
    original = Plain(tmp_path/'src', tied=True, **ROPES['llama3'])
    original.lm.save_pretrained(tmp_path/'lm'); original.tok.save_pretrained(tmp_path/'lm'); clip(1).save_pretrained(tmp_path/'clip')
    assert not any('lm_head' in n for n in load_file(tmp_path/'lm/model.safetensors'))
    model, processor = join(tmp_path/'clip', tmp_path/'lm', template='llava_v1', say=lambda s: None)
    save(model, processor, tmp_path/'dst')
    same, again = original.agrees(tmp_path/'dst')
    assert same and again.lm_head.weight is again.get_input_embeddings().weight
    config = json.loads((tmp_path/'lm/config.json').read_text())
    (tmp_path/'lm/config.json').write_text(json.dumps(config | dict(tie_word_embeddings=False)))
    with pytest.raises(ValueError, match=r'lacks lm_head.weight.*say tie_word_embeddings'): join(tmp_path/'clip', tmp_path/'lm', template='llava_v1')


@pytest.mark.parametrize('name, words', [('mm_projector.bin', 'a projector alone'), ('adapter_config.json', 'an adapter of a base model')])
def test_a_part_alone_is_named(name, words, tmp_path):
    original = Plain(tmp_path/'src')
    (tmp_path/'src/model.safetensors').unlink(); (tmp_path/'src'/name).write_bytes(b'{}')
    with pytest.raises(FileNotFoundError, match=f'holds no weights.*{words}'): turned(original, tmp_path/'dst')


def test_shards_without_an_index_and_names_of_several_processes(tmp_path):
    original = Plain(tmp_path/'src')
    (tmp_path/'src/model.safetensors').unlink()
    names = sorted(original.state)
    for i in (0, 1): torch.save({f'module.{n}': original.state[n].clone() for n in names[i::2]}, tmp_path/f'src/pytorch_model-{i + 1:05d}-of-00002.bin')
    turned(original, tmp_path/'dst')
    assert original.agrees(tmp_path/'dst')[0]
    (tmp_path/'src/pytorch_model-00001-of-00002.bin').unlink()
    with pytest.raises(FileNotFoundError, match='lacks part 1 of 2'): turned(original, tmp_path/'dst')


# Sentencepiece's file alone, as all originals have it

@pytest.mark.parametrize('kind, legacy', [('llama', True), ('llama', False), ('mistral', True)])
def test_the_tokenizer_of_an_original(kind, legacy, tmp_path):
    from test_pieces import VICUNA, folder, theirs
    from llava_med.core.pieces import from_sentencepiece
    folder(tmp_path/'tok', words=VICUNA | dict(legacy=legacy))
    original = Plain(tmp_path/'src', kind, tok=from_sentencepiece(tmp_path/'tok'))
    for f in [*(tmp_path/'src').glob('token*')]: f.unlink()
    folder(tmp_path/'src', words=VICUNA | dict(legacy=legacy, tokenizer_class='LlamaTokenizer'))
    said = turned(original, tmp_path/'dst')
    assert any('tokenizer.model' in s for s in said) and original.agrees(tmp_path/'dst')[0]
    tok, new, later = load(tmp_path/'dst')[1].tokenizer, theirs(tmp_path/'tok'), theirs(tmp_path/'tok', legacy)
    turns = [{'role': 'user', 'content': [{'type': 'image'}, {'type': 'text', 'text': 'Where?'}]}, {'role': 'assistant', 'content': [{'type': 'text', 'text': 'left'}]},
             {'role': 'user', 'content': [{'type': 'text', 'text': 'Why?'}]}]
    ids, image = tok.apply_chat_template(turns, tokenize=True, add_generation_prompt=True, return_dict=False), tok.convert_tokens_to_ids('<image>')
    polite = ("A chat between a curious user and an artificial intelligence assistant. "
              "The assistant gives helpful, detailed, and polite answers to the user's questions.")
    head, asked = (polite + ' USER: ', '\nWhere? ASSISTANT: left') if kind == 'llama' else ('[INST] ', '\nWhere? [/INST] left ')
    rest = 'USER: Why? ASSISTANT:' if kind == 'llama' else '[INST] Why? [/INST]'
    assert ids == [1, *new.encode(head), image, *new.encode(asked), 2, *later.encode(rest)], 'LLaVA encodes the text on each side of an image by itself'


# The command

def test_the_command(tmp_path, capsys):
    original = Original(tmp_path/'src')
    assert main(['convert', str(tmp_path/'src'), str(tmp_path/'dst'), '--tower', 'own', '--pictures', 'crop']) == 0
    assert 'tower from the checkpoint itself' in capsys.readouterr().out and not load(tmp_path/'dst')[1].image_processor.do_pad
    with pytest.raises(SystemExit) as e: main(['convert', str(tmp_path/'src'), str(tmp_path/'x')])
    assert e.value.code == 2 and 'say own, or where openai/clip-vit-tiny is' in capsys.readouterr().err
    with pytest.raises(SystemExit) as e: main(['convert', '--help'])
    assert e.value.code == 0 and '--base' in capsys.readouterr().out
    assert main(['convert', str(tmp_path/'none'), str(tmp_path/'x'), '--tower', 'own']) == 1
    err = capsys.readouterr().err
    assert 'neither a folder nor a Hub id' in err and 'Traceback' not in err


# BiomedCLIP

def plain_vit(state, x, heads, depth):
    "A plain ViT of timm, said again: all hidden states."
    x = F.conv2d(x, state['patch_embed.proj.weight'], state['patch_embed.proj.bias'], stride=state['patch_embed.proj.weight'].shape[-1]).flatten(2).transpose(1, 2)
    x = torch.cat([state['cls_token'].expand(len(x), -1, -1), x], 1) + state['pos_embed']
    states, w = [x], x.shape[-1]
    for i in range(depth):
        p = lambda n: (state[f'blocks.{i}.{n}.weight'], state[f'blocks.{i}.{n}.bias'])
        q, k, v = F.linear(F.layer_norm(x, (w,), *p('norm1'), 1e-6), *p('attn.qkv')).reshape(*x.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4)
        x = x + F.linear(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), *p('attn.proj'))
        x = x + F.linear(F.gelu(F.linear(F.layer_norm(x, (w,), *p('norm2'), 1e-6), *p('mlp.fc1'))), *p('mlp.fc2'))
        states.append(x)
    return states


def biomedclip(folder):
    torch.manual_seed(3)
    shape = {'cls_token': (1, 1, 128), 'pos_embed': (1, 17, 128), 'patch_embed.proj.weight': (128, 3, 12, 12), 'patch_embed.proj.bias': (128,), 'norm.weight': (128,), 'norm.bias': (128,)}
    for i, (n, s) in product(range(3), {'norm1': (128,), 'attn.qkv': (384, 128), 'attn.proj': (128, 128), 'norm2': (128,), 'mlp.fc1': (256, 128), 'mlp.fc2': (128, 256)}.items()):
        shape |= {f'blocks.{i}.{n}.weight': s, f'blocks.{i}.{n}.bias': s[:1]}
    state = {n: torch.randn(s)*.1 for n, s in shape.items()}
    folder.mkdir()
    torch.save({**{f'visual.trunk.{n}': v for n, v in state.items()}, 'visual.head.proj.weight': torch.zeros(4, 128), 'text.proj': torch.zeros(2), 'logit_scale': torch.tensor(1.)}, folder/'open_clip_pytorch_model.bin')
    (folder/'open_clip_config.json').write_text(json.dumps({'preprocess_cfg': {'mean': [.5, .4, .3], 'std': [.2, .2, .2]}}))
    return state


def test_biomedclip_is_a_plain_vit(tmp_path):
    state = biomedclip(tmp_path/'src')
    assert main(['convert', str(tmp_path/'src'), str(tmp_path/'vit')]) == 0
    tower, size, extra, images = read_tower(tmp_path/'vit')
    assert (size, extra) == (48, 1) and list(images['image_mean']) == [.5, .4, .3]
    x = torch.randn(2, 3, 48, 48)
    with torch.no_grad(): got = tower(x, output_hidden_states=True).hidden_states
    for a, b in zip(got, plain_vit(state, x, 2, 3), strict=True): assert torch.allclose(a, b, atol=1e-5)
    raw = torch.load(tmp_path/'src/open_clip_pytorch_model.bin')
    torch.save({**raw, 'visual.trunk.fc_norm.weight': torch.zeros(2)}, tmp_path/'src/open_clip_pytorch_model.bin')
    with pytest.raises(ValueError, match='fc_norm.weight fits nothing'): convert_vit(tmp_path/'src', tmp_path/'x')
    assert not (tmp_path/'x').exists()


def test_a_v10_checkpoint_with_biomedclip(tmp_path):
    original = Original(tmp_path/'src', 'llava', own=False, shards=1)
    state = biomedclip(tmp_path/'biomed')
    convert(tmp_path/'src', tmp_path/'dst', convert_vit(tmp_path/'biomed', tmp_path/'vit'), say=lambda s: None)
    got, pixels, ids, *_ = ours(tmp_path/'dst', original)
    seen = lambda px, **kw: type('Out', (), {'hidden_states': plain_vit(state, px, 2, 3)})
    assert torch.allclose(got, original.logits(pixels, *ids, tower=seen), atol=2e-5)


# The full models, name by name and shape by shape, without their memory

LAYOUTS = json.loads((Path(__file__).parent/'layouts_7b.json').read_text())


def expand(patterns):
    "Patterns such as layers.{0-31}.mlp.{up,down}.weight → all names with their shapes."
    out = {}
    for pattern, shape in patterns.items():
        parts = re.split(r'\{([^}]*)\}', pattern)
        choices = [[p] if i % 2 == 0 else list(map(str, range(int(p.split('-')[0]), int(p.split('-')[1]) + 1))) if re.fullmatch(r'\d+-\d+', p) else p.split(',')
                   for i, p in enumerate(parts)]
        for name in map(''.join, product(*choices)):
            assert name not in out, name
            out[name] = tuple(shape)
    return out


def on_meta(patterns): return {n: torch.empty(s, dtype=torch.bfloat16, device='meta') for n, s in expand(patterns).items()}


@pytest.mark.parametrize('name', LAYOUTS)
def test_the_full_models_on_meta(name):
    want = LAYOUTS[name]
    state = on_meta(want['original'])
    if 'base' in want: state = add_base(state, on_meta(want['base']))
    stock = CLIPVisionConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=want['image_size'], patch_size=14, projection_dim=768)
    tower = None
    if want['tower'] == 'stock':
        with torch.device('meta'): tower = CLIPVisionModel(stock).state_dict()
    vision = own_tower(state, want['config']) if tower is None else stock
    assert vision.to_dict() == stock.to_dict(), 'sizes of an own tower come from its tensors'
    model, new, left_out = convert_weights(state, want['config'], vision, want['words'], tower)
    got = {disk_name(n, 'clip_vision_model'): tuple(v.shape) for n, v in new.items()}
    assert got == expand(want['standard'])
    text = model.config.text_config
    with torch.device('meta'):
        again = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, projector_hidden_act=model.config.projector_hidden_act))
    assert {n: tuple(v.shape) for n, v in again.state_dict().items()} == {n: tuple(v.shape) for n, v in new.items()}
    assert all(v.is_meta for v in new.values()) and all('rotary' in n for n in left_out)


def test_what_the_full_models_are():
    count = lambda p: sum(torch.Size(s).numel() for s in expand(p).values())
    assert count(LAYOUTS['llava_15_7b']['standard']) == 7_063_427_072
    assert len(expand(LAYOUTS['llava_med_v15']['original'])) == 291 + 4 + 391
    for name, theta, kv, extra in (('llava_med_v15', 1e6, 8, None), ('llava_15_7b', 1e4, 32, None), ('llava_med_v10', 1e4, 32, 2048)):
        from llava_med.models.convert import text_config
        text = text_config(LAYOUTS[name]['config'], 32064)
        assert text.rope_parameters['rope_theta'] == theta and text.num_key_value_heads == kv and text.head_dim == 128
        if extra: assert text.max_position_embeddings == extra and text.rms_norm_eps == 1e-6
        if kv == 8: assert text.sliding_window is None


@pytest.mark.parametrize('change, words', [(lambda p: p.pop('lm_head.weight'), 'missing'), (lambda p: p.update({'model.norm.bias': [4096]}), 'fits nothing'),
                                           (lambda p: p.update({'model.layers.{0-31}.mlp.down_proj.weight': [4096, 14335]}), 'instead of')])
def test_the_check_on_meta_can_fail(change, words):
    want = LAYOUTS['llava_med_v15']; patterns = dict(want['original']); change(patterns)
    state = on_meta(patterns)
    with pytest.raises(ValueError, match=words): convert_weights(state, want['config'], own_tower(state, want['config']), 32002)
