"Templates of the kinds that tokenizers bring: what is scored must be what the assistant says, wherever it stands."
import random

import pytest
from llava_med.train.batches import encode
from llava_med.models.llava import TEMPLATES, train_tokenizer
from llava_med.models.templates import answer_spans, scored_tokens
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
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
    rng = random.Random(style)
    for _ in range(40):
        chat = random_chat(rng)
        text, spans = answer_spans(byte_level, chat, STYLES[style])
        assert [text[a:b] for a, b in spans] == [m['content'] + END[style] for m in chat if m['role'] == 'assistant']

@pytest.mark.parametrize('name', TEMPLATES)
def test_templates_of_the_originals_score_nothing_else(byte_level, with_metaspace, name):
    rng = random.Random(name)
    for tok in (byte_level, with_metaspace)[:1 if name == 'plain' else 2]:   # the second knows no line break, which ends a plain caption
        for _ in range(20):
            chat = random_chat(rng)[:2 if name == 'plain' else None]
            ids, scored = scored_tokens(tok, chat, TEMPLATES[name])
            runs, last = [], False
            for i, s in zip(ids, scored):
                if s and not last: runs.append([])
                if s: runs[-1].append(i)
                last = s
            answers = [m['content'] for m in chat if m['role'] == 'assistant']
            found = [tok.decode(r, skip_special_tokens=True).removesuffix('###').strip() for r in runs]
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
