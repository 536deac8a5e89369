"Templates of the kinds that tokenizers bring: what is scored must be what the assistant says, wherever it stands."
import copy
import random

import pytest
import torch
from conftest import REPO
from llava_med.data.vqa import item_question, make_item, question_record
from llava_med.explain import attention, maps
from llava_med.generate import answers
from llava_med.generate.prefix_cache import split_ids
from llava_med.evaluate.subjects import predict
from llava_med.generate.prompts import Prompting
from llava_med.models.exchange import TEMPLATES, complete_template
from llava_med.models.llava import CHAT_TEMPLATE, load, make_processor, tiny_model, train_tokenizer
from llava_med.models.templates import answer_spans, as_turns, encode_turns, image_mark, prompt_ids, scored_tokens
from llava_med.train.batches import encode, record_samples
from llava_med.ui import widgets
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

SAID = "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}{{ '<image>' if c['type'] == 'image' else c['text'] }}{% endfor %}{% endif %}"
STYLES = {
    'chatml': "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
              "{% for m in messages %}<|im_start|>{{ m['role'] }}\n" + SAID + "{{ '<|im_end|>\n' }}{% endfor %}"
              "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    'headers': "{{ bos_token }}{% for m in messages %}{{ '<|head|>' + m['role'] + '<|/head|>\n\n' }}{% set said %}" + SAID + "{% endset %}{{ said | trim }}<|eot|>{% endfor %}",
    'brackets': "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] " + SAID + " [/INST]{% else %} " + SAID + "{{ eos_token }}{% endif %}{% endfor %}",
}
END = {'chatml': '<|im_end|>', 'headers': '<|eot|>', 'brackets': '<|end|>'}

@pytest.fixture(scope='module')
def byte_level(): return train_tokenizer(['which side is the nodule on? left right yes no user assistant system'], 320)

@pytest.fixture(scope='module')
def with_metaspace():
    "A tokenizer of the sentencepiece kind: the space before a word belongs to its token."
    tok = Tokenizer(models.BPE(unk_token='<unk>'))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    text = 'which side is the nodule on? left right yes no USER: ASSISTANT: Human: [INST] [/INST] ' + ' '.join(map(chr, range(33, 127)))
    tok.train_from_iterator([text]*3, trainers.BpeTrainer(vocab_size=300, special_tokens=['<unk>', '<|pad|>', '<|begin|>', '<|end|>', '<image>'], show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=tok, unk_token='<unk>', pad_token='<|pad|>', bos_token='<|begin|>', eos_token='<|end|>')

def random_chat(rng):
    "Questions and answers that share many substrings."
    words = ['no', 'nodule', 'left', 'yes', 'a', 'on the left', 'no nodule', 'assistant', 'user']
    say = lambda: ' '.join(rng.choices(words, k=rng.randint(1, 4)))
    chat = []
    for i in range(rng.randint(1, 4)):
        asked = say()
        chat += [dict(role='user', content=[dict(type='image'), dict(type='text', text=asked)] if i == 0 else asked), dict(role='assistant', content=say())]
    return chat

@pytest.mark.parametrize('style', STYLES)
def test_unmarked_templates_are_scored_on_each_answer_and_its_end(byte_level, style):
    rng, tok = random.Random(style), copy.deepcopy(byte_level)
    tok.add_tokens(['<|im_start|>', '<|im_end|>', '<|head|>', '<|/head|>', '<|eot|>'], special_tokens=True)
    template, ends = complete_template(tok, STYLES[style], say=lambda line: None)
    assert tok.convert_tokens_to_ids(END[style]) in ends
    for _ in range(40):
        chat = random_chat(rng)
        text, spans = answer_spans(tok, chat, template)
        assert [text[a:b].lstrip() for a, b in spans] == [m['content'] + END[style] for m in chat if m['role'] == 'assistant']


def test_a_template_that_asks_otherwise_than_it_trains_is_refused(byte_level):
    with pytest.raises(ValueError, match='trained otherwise than asked'): answer_spans(byte_level, random_chat(random.Random(2)), STYLES['headers'])

@pytest.mark.parametrize('name', [n for n in TEMPLATES if n != 'plain'])
def test_templates_of_the_originals_score_nothing_else(byte_level, with_metaspace, name):
    rng = random.Random(name)
    for tok in (byte_level, with_metaspace):
        template = complete_template(tok, name, say=lambda line: None)[0]
        for _ in range(20):
            chat = random_chat(rng)
            ids, scored = scored_tokens(tok, chat, template)
            runs, last = [], False
            for i, s in zip(ids, scored):
                if s and not last: runs.append([])
                if s: runs[-1].append(i)
                last = s
            answers = [m['content'] for m in chat if m['role'] == 'assistant']
            assert all(r[-1] == tok.eos_token_id for r in runs)
            found = [tok.decode(r, skip_special_tokens=True).strip() for r in runs]
            assert found == answers

def test_encode_takes_a_template_without_marks(byte_level):
    chat = random_chat(random.Random(1))
    byte_level.chat_template, was = STYLES['chatml'], byte_level.chat_template
    try:
        e = encode(byte_level, chat, 4)
        said = byte_level.decode([t for t in e['labels'] if t >= 0])
        assert said == ''.join(m['content'] + '<|im_end|>' for m in chat if m['role'] == 'assistant')
        assert e['input_ids'].count(byte_level.convert_tokens_to_ids('<image>')) == 4
        with pytest.raises(ValueError, match='No token'): encode(byte_level, chat[:1], 4)
        with pytest.raises(ValueError, match='max_len'): encode(byte_level, [chat[0], dict(role='assistant', content='left '*200)], 4, max_len=10)
    finally: byte_level.chat_template = was

def test_an_empty_answer_is_not_scored(byte_level):
    chat = [dict(role='user', content='why?'), dict(role='assistant', content=' ')]
    assert answer_spans(byte_level, chat, STYLES['chatml'])[1] == []
    more = [*chat, dict(role='user', content='left?'), dict(role='assistant', content='no')]
    text, [(a, b)] = answer_spans(byte_level, more, STYLES['chatml'])
    assert text[a:b] == 'no<|im_end|>'


# One encoder: a model is asked in the very tokens that it was trained on

GOLDEN = {   # of data/base_tiny with two tokens an image, computed when training and asking had an encoder each
    'talk': [1, 3, 5, 5, 60, 77, 317, 77, 397, 314, 266, 929, 322, 36, 2, 4, 274, 307, 2, 3, 46, 88, 967, 415, 36, 2, 4, 313, 2],
    'caption': [1, 3, 5, 5, 41, 321, 736, 71, 74, 456, 273, 593, 293, 530, 89, 70, 541, 19, 2, 4, 38, 526, 1075, 504, 267, 416, 929, 19, 2],
    'text': [1, 3, 60, 288, 89, 314, 267, 929, 36, 2, 4, 38, 416, 621, 635, 1117, 19, 2],
    'question': [1, 3, 5, 5, 60, 77, 317, 77, 498, 314, 968, 83, 36, 2, 4, 1098, 2],
    'options': [1, 3, 5, 5, 60, 77, 317, 77, 498, 314, 968, 83, 36, 204, 38, 19, 617, 204, 39, 19, 872, 2, 4, 1098, 2],
    'system': [1, 3, 62, 277, 598, 81, 85, 19, 2, 3, 5, 5, 5, 5, 60, 77, 317, 77, 314, 297, 276, 76, 284, 36, 2, 4, 274, 307, 2]}
SCORED = dict(talk=[16, 17, 18, 27, 28], caption=range(20, 29), text=range(11, 18), question=[15, 16], options=[23, 24], system=[26, 27, 28])
SYSTEM = [dict(role='system', content='You help.'),
          dict(role='user', content=[dict(type='image')]*2 + [dict(type='text', text='Which is larger?')])]
said = lambda *texts: [{'from': ('human', 'gpt')[i % 2], 'value': t} for i, t in enumerate(texts)]
item_of = lambda question='Which organ is shown?', **kw: make_item('q', kw.pop('images', ['a.png']), question, 'lung', 'OPEN', 'train', 'mine', **kw)


def golden_records():
    return dict(talk=dict(id='a', image='a.png', conversations=said('<image>\nWhich side is the nodule on?', 'left', 'Is it large?', 'no')),
                caption=dict(id='b', image='a.png', conversations=said('Describe this image in detail.\n<image>', 'A chest radiograph with a small nodule.')),
                text=dict(id='c', conversations=said('What is a nodule?', 'A small round spot.')),
                question=question_record(item_of()), options=question_record(item_of(options=['lung', 'liver'])))


@pytest.fixture(scope='module')
def shipped(): return load(REPO/'data/base_tiny')


def test_the_shipped_tokenizer_reads_what_it_always_read(shipped):
    processor = shipped[1]
    records = golden_records()
    samples, _ = record_samples(list(records.values()), processor.tokenizer, 2)
    samples.append(encode(processor.tokenizer, [*SYSTEM, dict(role='assistant', content='left')], 2))
    for name, s in zip(GOLDEN, samples):
        assert s['input_ids'] == GOLDEN[name], name
        assert [i for i, l in enumerate(s['labels']) if l >= 0] == list(SCORED[name]), name
    for prompt, n, whole, length in [('Which side is the nodule on?', 1, 'talk', 16), ('What is a nodule?', 0, 'text', 11),
                                     (item_question(item_of()), 1, 'question', 15), (SYSTEM, 0, 'system', 26)]:
        prefix, rest = split_ids(prompt_ids(processor, [prompt], [n])[0], 5, 2)
        assert [*prefix, *rest] == GOLDEN[whole][:length]


def begins(text, template):
    "A processor whose template leaves BOS to the tokenizer, which adds it."
    tok = train_tokenizer([text], 320)
    tok.chat_template = template
    tok.backend_tokenizer.post_processor = TemplateProcessing(single='<|begin|> $A', special_tokens=[('<|begin|>', tok.bos_token_id)])
    return make_processor(tok, 24, 12)


NO_BOS = CHAT_TEMPLATE.replace('{{ bos_token }}', '')
WORDS = 'which organ is shown? lung liver is it larger? system user assistant You help.'


@pytest.fixture(scope='module', params=['shipped', 'without BOS', 'system turn', 'named by the processor'])
def asked(request, shipped):
    "A model and its processor."
    if request.param == 'shipped': return shipped
    processor = begins(WORDS, STYLES['chatml'] if request.param == 'system turn' else NO_BOS)
    if request.param == 'named by the processor': processor.chat_template = TEMPLATES['llava_v1']   # the tokenizer has another one
    return tiny_model(processor)


ITEMS = {'a question': item_of(), 'multiple choice': item_of(options=['lung', 'liver']), 'two images': item_of('Is it larger?', images=['a.png', 'b.png'])}


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp('pictures')
    for n, c in (('a.png', 90), ('b.png', 190)): Image.new('RGB', (24, 24), (c,)*3).save(folder/n)
    return folder


def learned_ids(model, processor, item):
    "The ids that training sees before the answer, and the answer's."
    (s,), names = record_samples([question_record(item)], processor, model.config.image_seq_length)
    assert names == item['images']
    first = next(i for i, l in enumerate(s['labels']) if l >= 0)
    return s['input_ids'][:first], s['input_ids'][first:]


@pytest.mark.parametrize('kind', ITEMS)
def test_training_and_asking_give_equal_ids(asked, pictures, monkeypatch, tmp_path, kind):
    model, processor = asked
    item, seen = ITEMS[kind], []
    read, decode = answers.read_prefixes, answers.decode_parts
    monkeypatch.setattr(answers, 'read_prefixes', lambda m, p, f: seen.append(list(p[0])) or read(m, p, f))
    def noted(model, parts, *more):
        def each():
            for suffixes, cache in parts:
                seen[-1].extend(suffixes[0][0])
                yield suffixes, cache
        return decode(model, each(), *more)
    monkeypatch.setattr(answers, 'decode_parts', noted)
    predict(model, processor, [item], pictures, tmp_path/'log.jsonl', 'toy', max_new_tokens=1)
    learned, _ = learned_ids(model, processor, item)
    assert seen == [learned]
    assert seen[0].count(processor.tokenizer.bos_token_id) == 1
    for way in (Prompting('plain'), Prompting('options', '{question}\n{options}')):
        assert encode_turns(processor, as_turns(way.prompt_of(item), len(item['images'])), model.config.image_seq_length, cue=True)[0] == seen[0]
    generate, plain = model.generate, []
    monkeypatch.setattr(model, 'generate', lambda input_ids, **kw: plain.append(input_ids[0].tolist()) or generate(input_ids=input_ids, **kw))
    answers.plain_answer(model, processor, [[pictures/n for n in item['images']]], [item_question(item)], max_new_tokens=1)
    assert plain == seen


def test_options_are_scored_as_they_were_trained(asked, pictures):
    model, processor = asked
    item = ITEMS['multiple choice']
    learned, answer = learned_ids(model, processor, item)
    ids, = answers._reply_ids(processor, item_question(item), 1, ['lung'])
    prompt = encode_turns(processor, as_turns(item_question(item)), model.config.image_seq_length, cue=True)[0]
    assert [*prompt, *ids] == [*learned, *answer]


def test_maps_and_widgets_read_what_asking_reads(asked, pictures):
    model, processor = asked
    image = Image.open(pictures/'a.png')
    want = encode_turns(processor, as_turns('which organ?'), model.config.image_seq_length, cue=True)[0]
    s = attention.encode_sample(processor, image, 'which organ?', 'lung')
    assert s.ids[:-s.n_answer].tolist() == want
    assert maps.other_question(processor, attention.encode_sample(processor, image, 'is it?', 'lung'), 'which organ?', 'lung').ids.tolist() == s.ids.tolist()
    asked_kind = [i for i, k in zip(s.ids.tolist(), s.kinds) if attention.TOKEN_KINDS[k] == 'question']
    assert processor.tokenizer.decode(asked_kind).strip().endswith('which organ?')   # BOS does not shift the kinds
    seen = []
    class Model:
        device, dtype = torch.device('cpu'), torch.float32
        def generate(self, input_ids, streamer, **kw): seen.append(input_ids[0].tolist()); streamer.end()
    list(widgets.stream_answer(Model(), processor, image, as_turns('which organ?')))
    assert seen == [want]


def test_a_prompt_is_rendered_once(asked, pictures, monkeypatch):
    model, processor = asked
    n, write = [], type(processor).apply_chat_template
    monkeypatch.setattr(type(processor), 'apply_chat_template', lambda self, *a, **kw: n.append(1) or write(self, *a, **kw))
    images = [pictures/'a.png', pictures/'b.png']*3
    answers.answer(model, processor, images, ['which organ?', 'is it?', 'is it?']*2, max_new_tokens=1, batch_size=1)
    assert len(n) == 2
    n.clear()
    answers.option_logprobs(model, processor, images, ['which organ?']*6, [['lung', 'liver']]*6)
    assert len(n) == 1 + 1 + 2   # the prompt for itself and for its options, and each option behind it


def test_perplexity_reads_what_training_reads(asked):
    "The loss of a reply to a text question is that of the training sample."
    model, processor = asked
    (got, n), = answers.reply_losses(model, processor, [('which organ?', 'lung')])
    e = encode(processor, [*as_turns('which organ?', 0), dict(role='assistant', content='lung')], 4)
    first = next(i for i, l in enumerate(e['labels']) if l >= 0)
    with torch.no_grad(): logp = model(input_ids=torch.tensor([e['input_ids']])).logits[0].log_softmax(-1)
    want = -sum(logp[i - 1, e['input_ids'][i]].item() for i in range(first, len(e['input_ids'])))
    assert len(e['input_ids']) - first == n and abs(got - want) < 1e-3


def test_a_tokenizer_without_the_image_token_has_no_slots():
    tok = train_tokenizer([WORDS], 300)
    assert image_mark(tok) == tok.convert_tokens_to_ids('<image>')
    class Words:   # as a text model's
        unk_token_id, image_token = 0, None
        def convert_tokens_to_ids(self, t): return 0
    assert image_mark(Words()) is None
