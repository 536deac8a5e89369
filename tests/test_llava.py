"Parts of other families joined into a LLaVA, and what a saved folder is worth without this library."
import json
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import (AutoModelForCausalLM, AutoTokenizer, CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel,
                          ConvNextConfig, ConvNextModel, Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig,
                          Dinov2WithRegistersModel, Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM,
                          MistralConfig, MistralForCausalLM, PhiConfig, PhiForCausalLM, Qwen2Config, Qwen2ForCausalLM,
                          SiglipVisionConfig, SiglipVisionModel, ViTConfig, ViTModel)

from llava_med.models.adapters import add_lora, base_hash, load_adapter, merge, merge_folders, save_adapter
from llava_med.models.anatomy import vision_features
from llava_med.core.cards import write_card
from llava_med.models.anatomy import disk_name
from llava_med.models.llava import chat_template, join, load, read_tower, save, tiny_model, train_tokenizer, weights_hash
from llava_med.core.runs import data_dir

SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=48, patch_size=12)
WORDS = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             bos_token_id=1, eos_token_id=2, pad_token_id=0)
TOWERS = {'clip': (CLIPVisionModel, CLIPVisionConfig, 16, 1), 'siglip': (SiglipVisionModel, SiglipVisionConfig, 16, 0),
          'vit': (ViTModel, ViTConfig, 16, 1), 'dinov2': (Dinov2Model, Dinov2Config, 16, 1),
          'registers': (Dinov2WithRegistersModel, Dinov2WithRegistersConfig, 20, 5)}
LANGUAGES = {'llama': (LlamaForCausalLM, LlamaConfig), 'mistral': (MistralForCausalLM, MistralConfig), 'qwen2': (Qwen2ForCausalLM, Qwen2Config)}


def tokenizer(image=True, template=True):
    "Words for a language model that has or has not met pictures."
    tok = train_tokenizer(['a small nodule in the left lung', 'is there an effusion?'], 300)
    if not image:
        file = json.loads(tok.backend_tokenizer.to_str())
        file['added_tokens'] = [a for a in file['added_tokens'] if a['content'] != '<image>']
        del file['model']['vocab']['<image>']
        order = sorted(file['model']['vocab'], key=file['model']['vocab'].get)
        file['model']['vocab'] = {w: i for i, w in enumerate(order)}
        from tokenizers import Tokenizer
        tok = type(tok)(tokenizer_object=Tokenizer.from_str(json.dumps(file)), bos_token='<|begin|>', eos_token='<|end|>')
    tok.chat_template = "{% for m in messages %}{{ '<|user|>' + m['content'] + '<|end|>' }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}" if template else None
    return tok


def language(folder, kind='llama', rows=None, seed=0, tok=None, **kw):
    "A causal language model in a folder, as `save_pretrained` leaves it."
    cls, config = LANGUAGES.get(kind) or kind
    tok = tok or tokenizer()
    torch.manual_seed(seed)
    cls(config(**{**WORDS, 'vocab_size': rows or len(tok), **kw})).save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder


def tower(folder, kind='clip', **kw):
    cls, config = TOWERS[kind][:2]
    torch.manual_seed(1)
    cls(config(**{**SMALL, **kw})).save_pretrained(folder)
    return folder


def asked(processor, text='where is it?'):
    picture = Image.linear_gradient('L').convert('RGB').resize((90, 60))
    turn = [{'role': 'user', 'content': [{'type': 'image'}, {'type': 'text', 'text': text}]}]
    return processor(images=picture, text=processor.apply_chat_template(turn, add_generation_prompt=True), return_tensors='pt')


@pytest.fixture(autouse=True)
def quiet():
    from transformers.utils import logging
    logging.set_verbosity_error()


# Joined from parts

@pytest.mark.parametrize('kind', TOWERS)
def test_any_tower(kind, tmp_path):
    model, processor = join(tower(tmp_path/'t', kind), language(tmp_path/'l'), layers=-2)
    q, n = asked(processor), TOWERS[kind][2]
    assert int((q['input_ids'] == model.config.image_token_id).sum()) == n == model.config.image_seq_length
    original = TOWERS[kind][0].from_pretrained(tmp_path/'t').eval()
    with torch.no_grad():
        states = original(q['pixel_values'], output_hidden_states=True).hidden_states
        want = states[-2][:, min(TOWERS[kind][3], 1):]
        assert torch.equal(vision_features(model, q['pixel_values']), want)
        got = model.model.get_image_features(q['pixel_values']).pooler_output[0]
        assert torch.allclose(model.model.multi_modal_projector(want)[0], got, atol=1e-6)
        assert torch.isfinite(model(**q).logits).all()
    again, processor2 = load(save(model, processor, tmp_path/'m'))
    assert torch.equal(model(**q).logits, again(**asked(processor2)).logits)


@pytest.mark.parametrize('kind', TOWERS)
def test_features_of_the_last_layer_are_those_of_the_model(kind, tmp_path):
    model, processor = join(tower(tmp_path/'t', kind), language(tmp_path/'l'), layers=-1)
    px = asked(processor)['pixel_values']
    with torch.no_grad():
        assert torch.allclose(model.model.multi_modal_projector(vision_features(model, px))[0], model.model.get_image_features(px).pooler_output[0], atol=1e-6)


@pytest.mark.parametrize('kind', LANGUAGES)
def test_any_language_model(kind, tmp_path):
    model, _ = join(tower(tmp_path/'t'), language(tmp_path/'l', kind))
    lm = AutoModelForCausalLM.from_pretrained(tmp_path/'l').eval()
    ids = torch.randint(6, 100, (2, 9))
    assert torch.equal(model(input_ids=ids).logits[..., :lm.config.vocab_size], lm(ids).logits)
    assert model.model.language_model.config is model.config.text_config


def test_several_layers_and_a_linear_connector(tmp_path):
    model, processor = join(tower(tmp_path/'t'), language(tmp_path/'l'), connector='linear', layers=[0, -2, -1])
    p, q = model.model.multi_modal_projector, asked(processor)
    assert p.linear_1.in_features == 96 and model.config.projector_hidden_act == 'linear'
    assert torch.equal(p.linear_2.weight, torch.eye(32)) and not p.linear_2.bias.any()
    feats = vision_features(model, q['pixel_values'])
    with torch.no_grad():
        got = model.model.get_image_features(q['pixel_values']).pooler_output[0]
        assert torch.allclose(torch.nn.functional.linear(feats[0], p.linear_1.weight, p.linear_1.bias), got, atol=1e-6)
    again, p2 = load(save(model, processor, tmp_path/'m'))
    assert torch.equal(again(**asked(p2)).logits, model(**q).logits)


def test_the_tower_of_a_whole_clip(tmp_path):
    torch.manual_seed(0)
    whole = CLIPModel(CLIPConfig(vision_config=SMALL, text_config=dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=99)))
    whole.save_pretrained(tmp_path/'clip')
    got, size, extra, _ = read_tower(tmp_path/'clip')
    assert (size, extra) == (48, 1)
    assert torch.equal(got.state_dict()['encoder.layers.1.mlp.fc1.weight'], whole.vision_model.encoder.layers[1].mlp.fc1.weight)


@pytest.mark.parametrize('kind', ['clip', 'siglip', 'vit', 'dinov2'])
def test_another_image_size(kind, tmp_path):
    model, processor = join(tower(tmp_path/'t', kind), language(tmp_path/'l'), image_size=72)
    q = asked(processor)
    assert q['pixel_values'].shape[-1] == 72 and model.config.image_seq_length == 36
    assert model(**q).logits.isfinite().all()
    flat = {n: p for n, p in TOWERS[kind][0].from_pretrained(tmp_path/'t').state_dict().items()}
    same = read_tower(tmp_path/'t')[0].state_dict()
    assert all(torch.equal(p, same[n]) for n, p in flat.items() if 'pool' not in n), 'at its own size nothing is stretched'


def test_stretched_positions_keep_a_flat_field_flat_and_the_class_vector(tmp_path):
    t = CLIPVisionModel(CLIPVisionConfig(**SMALL))
    with torch.no_grad():
        t.embeddings.position_embedding.weight[1:] = 3.
        t.embeddings.position_embedding.weight[0] = 7.
    t.save_pretrained(tmp_path/'t')
    rows = read_tower(tmp_path/'t', 96)[0].embeddings.position_embedding.weight
    assert rows.shape[0] == 65 and (rows[0] == 7).all() and torch.allclose(rows[1:], torch.tensor(3.))


def test_a_tokenizer_without_image_token(tmp_path):
    said = []
    tok = tokenizer(image=False)
    assert '<image>' not in tok.get_vocab() and tok.pad_token is None
    model, processor = join(tower(tmp_path/'t'), language(tmp_path/'l', tok=tok), say=said.append)
    assert any('<image>' in s and '<pad>' in s for s in said) and any('resized' in s for s in said)
    old = AutoModelForCausalLM.from_pretrained(tmp_path/'l')
    rows, n = model.get_input_embeddings().weight, len(tok)
    assert len(rows) % 64 == 0 and model.config.text_config.vocab_size == len(rows)
    assert torch.equal(rows[:n], old.get_input_embeddings().weight)
    assert torch.allclose(rows[n:], old.get_input_embeddings().weight.mean(0).expand(len(rows) - n, -1), atol=1e-6)
    assert torch.allclose(model.lm_head.weight[n:], old.lm_head.weight.mean(0).expand(len(rows) - n, -1), atol=1e-6)
    again, p2 = load(save(model, processor, tmp_path/'m'))
    q = asked(p2)
    assert int((q['input_ids'] == again.config.image_token_id).sum()) == 16
    assert torch.equal(again(**q).logits, model(**asked(processor)).logits)
    assert p2.tokenizer.pad_token == '<pad>' and model.provenance['added_tokens'] == ['<image>', '<pad>']


def test_spare_rows_are_used_before_new_ones(tmp_path):
    said = []
    model, _ = join(tower(tmp_path/'t'), language(tmp_path/'l', tok=tokenizer(image=False), rows=400), say=said.append)
    assert len(model.get_input_embeddings().weight) == 400 and not any('resized' in s for s in said)


def test_tied_embeddings_stay_tied(tmp_path):
    model, processor = join(tower(tmp_path/'t'), language(tmp_path/'l', 'qwen2', tok=tokenizer(image=False), tie_word_embeddings=True), say=lambda s: None)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    save(model, processor, tmp_path/'m', dtype='bfloat16')
    again, _ = load(tmp_path/'m')
    assert again.lm_head.weight.data_ptr() == again.get_input_embeddings().weight.data_ptr()


def test_the_same_seed_gives_the_same_projector(tmp_path):
    a, b, c = (join(tower(tmp_path/'t'), language(tmp_path/'l'), seed=s)[0] for s in (3, 3, 4))
    assert weights_hash(a) == weights_hash(b) != weights_hash(c)


# What does not fit

def test_heads_that_do_more_are_refused(tmp_path):
    for kind, kw in (((Gemma2ForCausalLM, Gemma2Config), dict(final_logit_softcapping=.01, head_dim=8)), ((PhiForCausalLM, PhiConfig), {})):
        language(tmp_path/'l', kind, **kw)
        if kw == {}:
            lm = AutoModelForCausalLM.from_pretrained(tmp_path/'l'); torch.nn.init.normal_(lm.lm_head.bias); lm.save_pretrained(tmp_path/'l')
        try: model, processor = join(tower(tmp_path/'t'), tmp_path/'l')
        except ValueError as e: assert 'last layer' in str(e); continue
        pytest.fail(f'{kind[0].__name__} was accepted')


@pytest.mark.parametrize('break_it, words', [
    (lambda d: (ConvNextModel(ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1])).save_pretrained(d/'t')), 'not 3136 patch vectors'),
    (lambda d: language(d/'t'), 'patch_size'),
    (lambda d: (d/'t/config.json').unlink(), 'cannot be read as a vision tower'),
    (lambda d: (d/'l/tokenizer.json').unlink(), 'causal language model'),
    (lambda d: (d/'l/chat_template.jinja').unlink(), 'has no chat template; name one of llava_v0'),
])
def test_one_sentence_for_parts_that_do_not_fit(break_it, words, tmp_path):
    tower(tmp_path/'t'); language(tmp_path/'l'); break_it(tmp_path)
    with pytest.raises(ValueError, match=words) as e: join(tmp_path/'t', tmp_path/'l')
    assert str(tmp_path) in str(e.value) and '\n' not in str(e.value)


def test_missing_weights_are_named(tmp_path):
    tower(tmp_path/'t'); language(tmp_path/'l')
    from safetensors.torch import load_file, save_file
    f = tmp_path/'t/model.safetensors'; state = load_file(f)
    gone = next(k for k in state if 'fc1.weight' in k)
    save_file({k: v for k, v in state.items() if k != gone}, f, {'format': 'pt'})
    with pytest.raises(ValueError, match=r'lacks encoder.*fc1\.weight'): join(tmp_path/'t', tmp_path/'l')


def test_a_grid_that_does_not_agree(tmp_path):
    model, processor = tiny_model(image_size=48)
    save(model, processor, tmp_path/'m')
    config = json.loads((tmp_path/'m/processor_config.json').read_text())
    config['image_processor']['crop_size'] = {'height': 96, 'width': 96}
    (tmp_path/'m/processor_config.json').write_text(json.dumps(config))
    with pytest.raises(ValueError, match='64 tokens from 96 px in patches of 12, the configuration says 16 tokens from 48 px'): load(tmp_path/'m')
    config['patch_size'] = 24                              # as many tokens as there should be, of another picture
    (tmp_path/'m/processor_config.json').write_text(json.dumps(config))
    with pytest.raises(ValueError, match='16 tokens from 96 px in patches of 24'): load(tmp_path/'m')


def test_a_checkpoint_with_strange_or_missing_weights_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file
    model, processor = tiny_model()
    f = save(model, processor, tmp_path/'m')/'model.safetensors'
    state = load_file(f)
    save_file({**state, 'image_newline': torch.zeros(3)}, f, {'format': 'pt'})
    with pytest.raises(ValueError, match='fit nothing: image_newline'): load(tmp_path/'m')
    save_file({k: v for k, v in state.items() if 'linear_2' not in k}, f, {'format': 'pt'})
    with pytest.raises(ValueError, match='lacks .*linear_2'): load(tmp_path/'m')


def test_another_kind_of_model_is_named(tmp_path):
    language(tmp_path/'l')
    with pytest.raises(ValueError, match="of type 'llama', not 'llava'"): load(tmp_path/'l')
    with pytest.raises(FileNotFoundError, match='no config.json'): load(tmp_path/'none')


def test_a_processor_without_numbers_is_completed(tmp_path):
    model, processor = tiny_model()
    want = asked(processor)['input_ids']
    save(model, processor, tmp_path/'m')
    f = tmp_path/'m/processor_config.json'
    config = {k: v for k, v in json.loads(f.read_text()).items() if k not in ('patch_size', 'vision_feature_select_strategy', 'num_additional_image_tokens')}
    f.write_text(json.dumps(config))
    assert torch.equal(asked(load(tmp_path/'m')[1])['input_ids'], want)


# The chat template

@pytest.mark.parametrize('name, text', [
    ('llava_v1', "questions. USER: <image>\nwhere? ASSISTANT: left<|end|>USER: why? ASSISTANT:"),
    ('llava_v0', "questions.\n\n### Human: <image>\nwhere?\n### Assistant: left\n### Human: why?\n### Assistant:"),
    ('mistral_instruct', "<|begin|>[INST] <image>\nwhere? [/INST] left <|end|>[INST] why? [/INST]")])
def test_templates(name, text):
    tok = tokenizer()
    tok.chat_template = chat_template(tok, name)
    turns = [{'role': 'user', 'content': [{'type': 'image'}, {'type': 'text', 'text': 'where?'}]},
             {'role': 'assistant', 'content': 'left'}, {'role': 'user', 'content': 'why?'}]
    assert tok.apply_chat_template(turns, tokenize=False, add_generation_prompt=True).endswith(text)


def test_a_template_for_text_alone_learns_of_pictures(tmp_path):
    _, processor = join(tower(tmp_path/'t'), language(tmp_path/'l'))
    turn = [{'role': 'user', 'content': [{'type': 'image'}, {'type': 'text', 'text': 'why?'}]}]
    assert processor.apply_chat_template(turn) == '<|user|><image>\nwhy?<|end|>'
    assert processor.apply_chat_template([{'role': 'user', 'content': 'why?'}]) == '<|user|>why?<|end|>'


def test_the_whole_picture_is_seen_and_always_the_same(tmp_path):
    model, processor = join(tower(tmp_path/'t'), language(tmp_path/'l'))
    again = load(save(model, processor, tmp_path/'m'))[1]
    odd = Image.new('RGB', (101, 48), 'white')
    px = [p(images=odd, text='<image>', return_tensors='pt')['pixel_values'] for p in (processor, again, again)]
    assert torch.equal(px[0], px[1]) and torch.equal(px[1], px[2])
    middle, edge = px[0][0, 0, 24], px[0][0, 0, 2]
    assert (middle > 1.5).all(), 'white from side to side'
    assert (edge.abs() < .1).all(), 'padded with the mean colour'


# The folder, for readers without this library

CLEAN = '''
import importlib.util, json, os, sys
sys.path[:] = [p for p in sys.path if not os.path.isdir(os.path.join(p, 'llava_med'))]
sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in f'{getattr(f, "__module__", "")} {f}'.lower()]
assert importlib.util.find_spec('llava_med') is None, 'the library is in reach'
import torch
from PIL import Image
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging
logging.set_verbosity_error(); logging.disable_progress_bar()
for folder, adapter, out in json.loads(sys.argv[1]):
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    if adapter: model = PeftModel.from_pretrained(model, adapter).eval()
    picture = Image.linear_gradient('L').convert('RGB').resize((90, 60))
    turn = [{'role': 'user', 'content': [{'type': 'image'}, {'type': 'text', 'text': 'where is it?'}]}]
    q = processor(images=picture, text=processor.apply_chat_template(turn, add_generation_prompt=True), return_tensors='pt')
    with torch.no_grad(): torch.save({'logits': model(**q).logits, 'ids': model.generate(**q, max_new_tokens=8, do_sample=False)}, out)
'''


def test_in_a_clean_environment_all_give_the_same_logits_and_answers(tmp_path):
    cases = {}
    model, processor = load(data_dir()/'base_tiny')
    torch.manual_seed(0)
    torch.nn.init.normal_(model.model.multi_modal_projector.linear_1.weight, std=.05)    # as after a stage
    cases['stage'] = model, processor, save(model, processor, tmp_path/'stage'), ''
    model, processor = join(tower(tmp_path/'t', 'siglip'), language(tmp_path/'l', 'mistral', tok=tokenizer(image=False)), connector='linear',
                            layers=[-2, -1], template='mistral_instruct', say=lambda s: None)
    cases['joined'] = model, processor, save(model, processor, tmp_path/'joined'), ''
    adapted = trained(load(tmp_path/'joined')[0])
    cases['adapter'] = adapted, processor, tmp_path/'joined', save_adapter(adapted, tmp_path/'adapter')
    merged = load(merge_folders(tmp_path/'joined', tmp_path/'adapter', tmp_path/'merged'))[0]
    cases['merged'] = merged, processor, tmp_path/'merged', ''
    jobs = [[str(folder), str(adapter), str(tmp_path/f'{k}.pt')] for k, (_, _, folder, adapter) in cases.items()]
    run = subprocess.run([sys.executable, '-I', '-c', CLEAN, json.dumps(jobs)], cwd=tmp_path, capture_output=True, text=True,
                         env={'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1', 'PATH': '', 'HOME': str(tmp_path)})
    assert run.returncode == 0, run.stderr
    for k, (model, processor, *_) in cases.items():
        there, q = torch.load(tmp_path/f'{k}.pt', weights_only=True), asked(processor)
        with torch.no_grad(): logits, ids = model(**q).logits, model.generate(**q, max_new_tokens=8, do_sample=False)
        assert torch.allclose(there['logits'], logits, rtol=0, atol=2e-4) and torch.equal(there['ids'], ids), k
        cases[k] = logits
    assert torch.allclose(cases['merged'], cases['adapter'], atol=1e-5) and not torch.allclose(cases['joined'], cases['adapter'], atol=1e-2)


def names(folder): return sorted(k for f in folder.glob('*.safetensors') for k in safe_open(f, 'pt').keys())


@pytest.mark.parametrize('dtype', [None, 'bfloat16'])
@pytest.mark.parametrize('kind', ['clip', 'siglip', 'dinov2'])
def test_names_on_disk_are_those_that_every_version_reads(kind, dtype, tmp_path):
    model, processor = join(tower(tmp_path/'t', kind), language(tmp_path/'l'))
    want = sorted(disk_name(n, model.config.vision_config.model_type) for n in model.state_dict())
    for _ in range(2):        # as assembled, and loaded from the layout that we wrote
        got = names(save(model, processor, tmp_path/'m', dtype))
        assert len(got) == len(want) and (kind == 'dinov2' or got == want)
        model, processor = load(tmp_path/'m')
    prefix = 'vision_tower.vision_model.' if kind in ('clip', 'siglip') else 'vision_tower.embeddings'
    assert any(n.startswith(prefix) for n in got) and 'language_model.model.norm.weight' in got and 'language_model.lm_head.weight' in got
    if kind == 'dinov2': assert 'vision_tower.encoder.layer.0.attention.attention.key.weight' in got


def test_older_readers_find_their_names(tmp_path):
    model, processor = join(tower(tmp_path/'t'), language(tmp_path/'l', 'mistral', rope_parameters={'rope_type': 'default', 'rope_theta': 1e6}))
    save(model, processor, tmp_path/'m', 'bfloat16')
    config, words = (json.loads((tmp_path/f'm/{f}.json').read_text()) for f in ('config', 'tokenizer_config'))
    assert config['text_config']['rope_theta'] == 1e6 and config['torch_dtype'] == config['dtype'] == 'bfloat16'
    assert words['tokenizer_class'] == 'PreTrainedTokenizerFast' and isinstance(words['extra_special_tokens'], dict)
    images = json.loads((tmp_path/'m/preprocessor_config.json').read_text())
    assert images['do_pad'] and images['crop_size'] == {'height': 48, 'width': 48}
    again = load(tmp_path/'m')[0]
    assert again.config.text_config.rope_parameters['rope_theta'] == 1e6


def test_a_failed_save_keeps_the_older_model(tmp_path, monkeypatch):
    model, processor = tiny_model()
    save(model, processor, tmp_path/'m'); before = names(tmp_path/'m')
    monkeypatch.setattr(type(processor), 'save_pretrained', lambda *a, **k: (_ for _ in ()).throw(OSError(28, 'No space left on device')))
    with pytest.raises(OSError, match='free some space'): save(model, processor, tmp_path/'m')
    assert names(tmp_path/'m') == before and [p.name for p in tmp_path.iterdir()] == ['m']


def test_where_a_model_comes_from_survives_a_stage(tmp_path):
    model, processor = join(tower(tmp_path/'t'), language(tmp_path/'l'))
    stock = weights_hash(read_tower(tmp_path/'t')[0])
    save(*load(save(model, processor, tmp_path/'a')), tmp_path/'b')
    kept = json.loads((tmp_path/'b/provenance.json').read_text())
    assert kept['vision_tower'] == {'source': str(tmp_path/'t'), 'sha256': stock}


def test_the_card_shows_scores(tmp_path):
    model, processor = tiny_model()
    save(model, processor, tmp_path/'m')
    head = 'model,dataset,split,condition,slice,metric,value,low,high,n_items,n_images\n'
    (tmp_path/'scores.csv').write_text(head + 'stage2,phantoms,test,image,all,strict,0.918,0.9,0.93,2000,300\n'
                                       'stage2,phantoms,test,image,modality=mri,strict,0.5,,,20,3\nbase,phantoms,test,blank,all,strict,0.25,,,2000,300\n')
    text = write_card(tmp_path/'m', 'A model', ['PMC figures, CC BY'], 'apache-2.0', scores=tmp_path/'scores.csv', model='stage2').read_text()
    assert '| stage2 | phantoms test | image | strict | 0.918 (0.900 to 0.930) | 2000 | 300 |' in text
    assert 'mri' not in text and '| base' not in text and 'PMC figures, CC BY' in text and 'Research and teaching only' in text
    with pytest.raises(ValueError, match="no row .* for model 'tuned'"): write_card(tmp_path/'m', 'A', ['x'], 'mit', scores=tmp_path/'scores.csv', model='tuned')


# Adapters

def trained(model, seed=0, **kw):
    "An adapter whose every tensor has moved."
    adapted = add_lora(model, **{'rank': 4, **kw}).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad: p.add_(torch.randn_like(p)*.05)
    return adapted


@pytest.fixture
def based(tmp_path):
    "A joined model in a folder."
    model, processor = join(tower(tmp_path/'t'), language(tmp_path/'l', 'mistral', tok=tokenizer(image=False)), template='mistral_instruct', say=lambda s: None)
    return save(model, processor, tmp_path/'base'), model, processor


def test_merged_is_the_adapter_and_a_plain_model(based, tmp_path):
    base, model, processor = based
    adapted = trained(model)
    merged = load(merge_folders(base, save_adapter(adapted, tmp_path/'adapter'), tmp_path/'merged'))[0]
    with torch.no_grad(): assert torch.allclose(merged(**asked(processor)).logits, adapted(**asked(processor)).logits, atol=1e-5)
    assert names(tmp_path/'merged') == names(base)
    assert json.loads((tmp_path/'merged/provenance.json').read_text())['merged_adapter_onto']['base'] == base_hash(load(base)[0])


@pytest.mark.parametrize('kind', LANGUAGES)
@pytest.mark.parametrize('sight', ['clip', 'dinov2'])
def test_no_adapter_in_the_tower(sight, kind, tmp_path):
    model, _ = join(tower(tmp_path/'t', sight), language(tmp_path/'l', kind), say=lambda s: None)
    before = weights_hash(model.model.vision_tower)
    adapted = trained(model)
    learns = [n for n, p in adapted.named_parameters() if p.requires_grad]
    assert sum('lora_' in n for n in learns) == 2*2*7 and not [n for n in learns if 'vision_tower' in n or 'embed' in n or 'lm_head' in n]
    assert {n.split('modules_to_save.default.')[1] for n in learns if 'projector' in n} == {f'linear_{i}.{k}' for i in (1, 2) for k in ('weight', 'bias')}
    assert weights_hash(merge(adapted).model.vision_tower) == before


def test_an_adapter_for_another_base_is_refused(based, tmp_path):
    base, model, processor = based
    save_adapter(trained(model), tmp_path/'adapter')
    with torch.no_grad(): (other := load(base)[0]).lm_head.weight[3, 3] += .1
    with pytest.raises(ValueError, match='trained on another base') as e: load_adapter(other, tmp_path/'adapter')
    assert str(tmp_path/'adapter') in str(e.value) and '\n' not in str(e.value)
    load_adapter(load(base, dtype='bfloat16')[0], tmp_path/'adapter')      # the same base in another precision


def test_an_adapter_that_lost_a_tensor_is_refused(based, tmp_path):
    from safetensors.torch import load_file, save_file
    base, model, _ = based
    f = save_adapter(trained(model), tmp_path/'adapter')/'adapter_model.safetensors'
    state = load_file(f)
    save_file({k: v for k, v in state.items() if 'layers.1.mlp.up_proj.lora_B' not in k}, f)
    with pytest.raises(ValueError, match='up_proj.lora_B'): load_adapter(load(base)[0], tmp_path/'adapter')


def test_the_identity_of_a_linear_connector_is_never_trained(tmp_path):
    model, processor = join(tower(tmp_path/'t'), language(tmp_path/'l'), connector='linear')
    base = save(model, processor, tmp_path/'base')
    merged = load(merge_folders(base, save_adapter(trained(model), tmp_path/'a'), tmp_path/'m'))[0].model.multi_modal_projector
    first = load(base)[0].model.multi_modal_projector
    assert torch.equal(merged.linear_2.weight, torch.eye(32)) and not torch.equal(merged.linear_1.weight, first.linear_1.weight)


def test_training_goes_on_from_a_saved_adapter(based, tmp_path):
    base, model, processor = based
    adapted = trained(model)
    save_adapter(adapted, tmp_path/'a')
    again = load_adapter(load(base)[0], tmp_path/'a', trainable=True)
    names = lambda m: {n: p for n, p in m.named_parameters() if p.requires_grad}
    assert names(again).keys() == names(adapted).keys() and all(torch.equal(p, names(adapted)[n]) for n, p in names(again).items())
    save_adapter(again, tmp_path/'b')
    assert json.loads((tmp_path/'b/provenance.json').read_text()) == json.loads((tmp_path/'a/provenance.json').read_text())


def test_the_card_of_an_adapter(based, tmp_path):
    text = write_card(save_adapter(trained(based[1]), tmp_path/'a'), 'An adapter', ['VQA-RAD, CC0'], 'mit', base='org/base').read_text()
    assert 'library_name: peft' in text and 'base_model: org/base' in text
