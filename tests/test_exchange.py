"Templates of the kinds that models bring: whatever they write, training reads what asking asks, the answer, and an end that generation waits for."
import copy
import json
from datetime import datetime

import pytest
import torch
from llava_med.data.vqa import item_question, make_item
from llava_med.evaluate.subjects import LocalModel
from llava_med.generate.answers import answer, end_ids, option_logprobs
from llava_med.models.exchange import LISTED, TEMPLATES, complete_template, frozen, one_template
from llava_med.models.llava import join, load, make_processor, save, tiny_model, train_tokenizer
from llava_med.explain import attention, explorer, maps
from llava_med.generate.sampling import sample
from llava_med.models.templates import as_turns, chat, exchanges, model_inputs, prompt_ids, sample_ids
from llava_med.recipes.policy_gradient import PolicyGradient
from llava_med.train.batches import IGNORE, Collator, batch_loss, encode, record_samples
from llava_med.ui import widgets
from PIL import Image
from test_llava import language, tower
from transformers import AutoTokenizer
from transformers.utils import chat_template_utils

TEXT = "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}{{ '<image>' if c['type'] == 'image' else c['text'] }}{% endfor %}{% endif %}"
LIST = "{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}"
CUE = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
turn = lambda before='', text=TEXT, after="{{ '<|im_end|>\n' }}": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}" + before + text + after + "{% endfor %}"
NO_END = ("{% for m in messages %}{{ m['role'].upper() + ': ' }}{% if m['role'] == 'user' %}" + LIST + "{{ c['text'] + ' ' }}{% endfor %}"
          "{% else %}" + LIST + "{% generation %}{{ c['text'] + ' ' }}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}")
LAST = "{% if m['role'] == 'assistant' and loop.last %}"
KINDS = {   # kind → template, end token of the tokenizer, tokens at which its generation stops, samples of two exchanges, what is said
    'nothing to do': (turn() + CUE, '<|im_end|>', ['<|im_end|>'], 1, ''),
    'thinks in the last turn': (turn(LAST + "{{ '<think>\n\n</think>\n\n' }}{% endif %}") + CUE, '<|im_end|>', ['<|im_end|>'], 2, 'asks as it trains'),
    'thinks in the last turn and when asked': (turn(LAST + "{{ '<think>\n\n</think>\n\n' }}{% endif %}") + CUE.replace('assistant\n', 'assistant\n<think>\n'), '<|im_end|>', ['<|im_end|>'], 2, 'asks as it trains'),
    'thinks in every turn': (turn("{% if m['role'] == 'assistant' %}<think></think>{% endif %}") + CUE, '<|im_end|>', ['<|im_end|>'], 1, 'asks as it trains'),
    'thinks when asked': (turn() + CUE.replace('assistant\n', 'assistant\n<think>\n'), '<|im_end|>', ['<|im_end|>'], 1, 'asks as it trains'),
    'a channel': (turn("{% if m['role'] == 'assistant' %}<|final|>{% endif %}") + CUE.replace("assistant\n", "assistant"), '<|im_end|>', ['<|im_end|>'], 1, 'asks as it trains'),
    'no end': (NO_END, '</s>', ['</s>'], 1, "'</s>' added"),
    'no end, text': (turn(after="{{ '\n' }}") + CUE, '</s>', ['</s>'], 1, "'</s>' added"),
    'another end': (turn() + CUE, '</s>', ['</s>'], 1, "'<|im_end|>', which generation did not wait for"),
    'an end between turns': (turn(after="{{ '' if loop.last else '<|im_end|>\n' }}") + CUE, '</s>', ['</s>', '<|im_end|>'], 1, "'<|im_end|>' added"),
    'the next turn is the end': ("{% for m in messages %}{{ '<|' + m['role'] + '|>' }}" + TEXT + "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n<think></think>' }}{% endif %}",
                                 '</s>', ['</s>', '<|user|>'], 1, "'<|user|>' added"),
    'two ends': (turn() + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% else %}{{ eos_token }}{% endif %}", '</s>', ['</s>', '<|im_end|>'], 1, ''),
    'the last turn ends otherwise': (turn(after="{{ '</s>' if loop.last and m['role'] == 'assistant' else '<|im_end|>\n' }}") + CUE, '</s>', ['</s>'], 2, ''),
    'dated': ("{% if strftime_now is defined %}{% set day = strftime_now('%d %b %Y') %}{% else %}{% set day = 'never' %}{% endif %}{{ 'Today: ' + day + '\n' }}" + turn() + CUE,
              '<|im_end|>', ['<|im_end|>'], 1, '26 Jul 2024'),
    'a newline more': (turn("{{ '\n' }}") + CUE, '<|im_end|>', ['<|im_end|>'], 1, ''),
    'a newline less': (turn().replace("m['role'] + '\n'", "m['role']") + CUE, '<|im_end|>', ['<|im_end|>'], 1, 'asks as it trains'),
    'a space at the end of the cue': ("{% for m in messages %}{{ m['role'] + ': ' }}" + TEXT + "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}", '</s>', ['</s>'], None, ''),
    'no cue': ("{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n\n' }}{% set said %}" + TEXT + "{% endset %}{{ said | trim }}<|im_end|>{% endfor %}", '<|im_end|>', ['<|im_end|>'], None, 'asks as it trains'),
    'begins': ("{{ bos_token }}" + turn() + CUE, '<|im_end|>', ['<|im_end|>'], 1, ''),
    'a system turn of its own': ("{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}" + turn() + CUE, '<|im_end|>', ['<|im_end|>'], 1, ''),
    'strips': (turn(text="{% set said %}" + TEXT + "{% endset %}{{ said | trim }}") + CUE, '<|im_end|>', ['<|im_end|>'], 1, ''),
    'text alone': ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}" + CUE, '<|im_end|>', ['<|im_end|>'], 1, ''),
    'strict roles': ("{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}{% endfor %}" + turn() + CUE, '<|im_end|>', ['<|im_end|>'], 1, ''),
    'several templates': ([dict(name='default', template=turn() + CUE), dict(name='tool_use', template='{{ tools }}')], '<|im_end|>', ['<|im_end|>'], 1, '')}
MARKS = ['</s>', '<|im_start|>', '<|im_end|>', '<|final|>']
WORDS = ['which organ is shown? liver kidney assistant user system \n\n\n on the left side where is it']


def reader(template, eos):
    "A processor that brings a template."
    tok = train_tokenizer(WORDS, 320)
    tok.add_tokens(MARKS, special_tokens=True)
    tok.eos_token = eos
    tok.chat_template = one_template(template) if isinstance(template, list) else template
    return make_processor(tok, 24, 12)


def base(folder, template, eos, stops, files=None):
    "A thin LLaVA in a folder as others leave it; `files` changes them."
    processor = reader(template, eos)
    model, _ = tiny_model(processor)
    ids = processor.tokenizer.convert_tokens_to_ids(stops)
    model.generation_config.eos_token_id = ids if len(ids) > 1 else ids[0]
    model.save_pretrained(folder); processor.save_pretrained(folder)
    if isinstance(template, list):
        (folder/'chat_template.jinja').unlink()
        for name in ('tokenizer_config.json',): edit(folder/name, chat_template=template)
    if files: files(folder)
    return folder


def edit(path, **new): path.write_text(json.dumps(json.loads(path.read_text()) | new))


ITEM = make_item('q', ['a.png'], 'which organ is shown?', 'liver', 'CLOSED', 'train', 'mine', options=['kidney', 'liver'])
said = lambda *texts: [{'from': ('human', 'gpt')[i % 2], 'value': t} for i, t in enumerate(texts)]
record = lambda *texts, **kw: dict(id='r', image='a.png', conversations=said('<image>\n' + texts[0], *texts[1:]), **kw)


def runs(sample):
    "Of each scored part: the ids before it, its ids."
    ids, labels, out = sample['input_ids'], sample['labels'], []
    for i, l in enumerate(labels):
        if l == IGNORE: continue
        if i == 0 or labels[i - 1] == IGNORE: out.append((ids[:i], []))
        out[-1][1].append(ids[i])
    return out


def exact(model, processor, record):
    "Every answer of a record stands behind what is asked and ends where generation stops; the number of samples."
    samples, _ = record_samples([record], processor, 4)
    tok, turns = processor.tokenizer, [t['value'] for t in record['conversations']]
    found = [r for s in samples for r in runs(s)]
    answers = [i for i in range(1, len(turns), 2) if turns[i].strip()]
    assert len(found) == len(answers)
    for i, (before, reply) in zip(answers, found):
        asked = [{'role': ('user', 'assistant')[k % 2], 'content': [{'type': 'image'}]*(k == 0) + [{'type': 'text', 'text': t.replace('<image>\n', '').strip()}]} for k, t in enumerate(turns[:i])]
        ids, = prompt_ids(processor, [asked], [1])
        assert before == [t for t in ids for _ in range(4 if t == model.config.image_token_id else 1)]
        assert reply[-1] in end_ids(model, tok) and not set(reply[:-1]) & end_ids(model, tok)
        assert tok.decode(reply, skip_special_tokens=True).strip() == turns[i].strip()
        assert before[:2].count(tok.bos_token_id) <= 1
    for s in samples: assert s['labels'][-1] != IGNORE                # nothing stands behind the last end
    return len(samples)


@pytest.fixture(scope='module', params=KINDS)
def kind(request, tmp_path_factory):
    "A kind's loaded model and processor, how many samples two exchanges are, what was said and what should be."
    template, eos, stops, n, words = KINDS[request.param]
    from contextlib import redirect_stdout
    from io import StringIO
    with redirect_stdout(StringIO()) as out: got = load(base(tmp_path_factory.mktemp('base'), template, eos, stops))
    return *got, n, out.getvalue(), words


def test_a_loaded_model_is_trained_for_what_it_is_asked(kind):
    model, processor, n, out, words = kind
    assert words in out and bool(words) == bool(out), out
    for q in (ITEM['question'], item_question(ITEM)):
        assert exact(model, processor, record(q, 'liver')) == 1
        got = exact(model, processor, record(q, 'liver', 'where is it?', 'on the left side'))
        assert got == n or n is None
    assert processor.chat_template == processor.tokenizer.chat_template


ANSWERS = ['é 肝臓 💊', 'a\nb\n\nc', 'ASSISTANT: left USER: why', '  liver ', 'yes. user: no', '<b>x</b> & {{ m }}', "it's 'left'", '1', 'where is it?']


def test_any_answer_is_learned_as_it_is(kind):
    model, processor, *_ = kind
    for text in ANSWERS:
        for r in (record('which organ?', text), record('which organ?', text, 'where is it?', text), record('where is it?', '', 'which organ?', text)):
            exact(model, processor, r)


def test_an_answer_that_holds_a_token_of_the_model_is_refused(kind):
    for mark in ('<|im_end|>', '</s>', '<|user|>', '<|begin|>'):
        for texts in (('why?', f'left {mark} right'), ('why?', f'left{mark}', 'where?', 'right')):
            with pytest.raises(ValueError, match="Record 'r': The answer holds"): record_samples([record(*texts)], kind[1], 4)


def test_what_is_saved_is_complete_already(kind, tmp_path, capsys):
    model, processor, *_ = kind
    save(model, processor, tmp_path/'model')
    capsys.readouterr()
    again, reads = load(tmp_path/'model')
    assert not capsys.readouterr().out
    assert reads.chat_template == processor.chat_template and end_ids(again, reads.tokenizer) == end_ids(model, processor.tokenizer)
    lone = LocalModel(tmp_path/'model')
    assert lone.render('why?', 1) == LocalModel(model, processor).render('why?', 1)


def test_options_and_answers_are_asked_like_that(kind):
    model, processor, *_ = kind
    grey = Image.new('RGB', (24, 24))
    assert len(answer(model, processor, [grey], ['why?'], 3)) == 1
    (p, n), (q, m) = option_logprobs(model, processor, [grey], ['which organ?'], [['liver', 'kidney']])[0]
    (before, reply), = runs(record_samples([record('which organ?', 'liver')], processor, 4)[0][0])
    assert n == len(reply) and p < 0 and q < 0


def test_both_ways_to_encode_are_one(kind, monkeypatch):
    "A cue that ends with a special token needs one tokenization; it has to be that of the general way."
    from llava_med.models import templates
    model, processor, *_ = kind
    talks = [exchanges(processor, [dict(role='user', content='which organ?'), dict(role='assistant', content=a), dict(role='user', content='where is it?'), dict(role='assistant', content=b)])
             for a, b in (('liver', 'left'), ('é 肝臓', ' a\n b'))]
    quick = sample_ids(processor.tokenizer, talks)
    monkeypatch.setattr(templates, 'closed_marks', lambda tok: ())
    assert sample_ids(processor.tokenizer, talks) == quick


# What cannot be completed is refused in words

@pytest.mark.parametrize('template, eos, words', [
    (turn(after="{{ '\n' }}") + CUE, None, 'would never stop'),
    (turn(text="{% set said %}" + TEXT + "{% endset %}{{ said | upper }}") + CUE, '</s>', 'loses the question, the answer'),
    ("{% for m in messages if m['role'] == 'user' %}" + TEXT + "{{ eos_token }}{% endfor %}", '</s>', 'loses the question, the answer'),
    ("{{ raise_exception('No') }}", '</s>', 'loses the question'),
    ("{{ strftime_now(day) }}" + turn() + CUE, '</s>', 'write the date into the template'),
    ({'rag': 'a', 'tool_use': 'b'}, '</s>', "rag, tool_use, and none is named 'default'")])
def test_a_template_that_cannot_be_completed_is_refused(template, eos, words, tmp_path):
    processor = reader(turn() + CUE, '</s>')
    model, _ = tiny_model(processor)
    tok = processor.tokenizer
    if eos is None: tok.eos_token = model.generation_config.eos_token_id = model.config.eos_token_id = None
    processor.chat_template = tok.chat_template = template
    model.save_pretrained(tmp_path/'base'); processor.save_pretrained(tmp_path/'base')
    with pytest.raises(ValueError, match=words) as e: load(tmp_path/'base')
    assert str(e.value).count('\n') == 0


def test_a_template_that_thinks_aloud_in_the_answer_is_refused_by_record(tmp_path, capsys):
    "It moves a thought out of the answer, so the answer would not stand behind what is asked."
    t = turn("{% set said %}" + TEXT + "{% endset %}{% if m['role'] == 'assistant' %}{{ '<think>' + (said.split('</think>')[0] if '</think>' in said else '') + '</think>' + said.split('</think>')[-1] }}{% else %}{{ said }}{% endif %}", text='') + CUE
    model, processor = load(base(tmp_path, t, '<|im_end|>', ['<|im_end|>']))
    exact(model, processor, record('why?', 'left'))
    with pytest.raises(ValueError, match="Record 'r': The chat template"): record_samples([record('why?', 'because</think>left')], processor, 4)


def test_a_system_turn_is_kept_or_left_out_with_a_word(tmp_path, capsys):
    system = lambda r: dict(r, conversations=[{'from': 'system', 'value': 'You are brief.'}, *r['conversations']])
    r = system(record('why?', 'left'))
    model, processor = load(base(tmp_path/'a', *KINDS['a system turn of its own'][:3]))
    (s,), _ = record_samples([r], processor, 4)
    text = processor.tokenizer.decode(s['input_ids'])
    assert 'You are brief.' in text and 'You help' not in text
    strict = load(base(tmp_path/'b', *KINDS['strict roles'][:3]))[1]
    (s,), _ = record_samples([r], strict, 4)   # which has no place for it
    assert 'You are brief.' not in strict.tokenizer.decode(s['input_ids']) and 'The system turn of 1 of 1 conversations was left out' in capsys.readouterr().out
    drops = load(base(tmp_path/'c', "{% for m in messages if m['role'] != 'system' %}{{ '<|im_start|>' + m['role'] + '\n' }}" + TEXT + "<|im_end|>{% endfor %}" + CUE, '<|im_end|>', ['<|im_end|>']))[1]
    (s,), _ = record_samples([r], drops, 4)
    assert 'You are brief.' not in drops.tokenizer.decode(s['input_ids']) and 'was left out' in capsys.readouterr().out
    turns = [dict(role='system', content='You are brief.'), dict(role='user', content='why?')]
    assert 'You are brief.' in chat(processor, turns)
    with pytest.raises(ValueError, match='leaves the system turn out'): chat(drops, turns)   # asking, as training


# Where a template lies, and what comes with it

def in_json(folder):
    "The template in the processor's old file alone."
    text = (folder/'chat_template.jinja').read_text()
    (folder/'chat_template.jinja').unlink()
    (folder/'chat_template.json').write_text(json.dumps(dict(chat_template=text)))


def in_words(folder):
    "The template in the tokenizer's configuration alone."
    text = (folder/'chat_template.jinja').read_text()
    (folder/'chat_template.jinja').unlink()
    edit(folder/'tokenizer_config.json', chat_template=text)


def without_pad(folder):
    edit(folder/'tokenizer_config.json', pad_token=None)
    edit(folder/'generation_config.json', pad_token_id=None)


@pytest.mark.parametrize('files', [None, in_json, in_words, without_pad])
def test_wherever_the_template_lies_a_stage_can_train(files, tmp_path):
    model, processor = load(base(tmp_path, *KINDS['no end'][:3], files))
    assert exact(model, processor, record('which organ?', 'liver')) == 1
    tok = processor.tokenizer
    for r in (processor, tok): assert record_samples([record('which organ?', 'liver')], r, 4)[0] == record_samples([record('which organ?', 'liver')], processor, 4)[0]
    assert tok.pad_token_id is not None and model.generation_config.pad_token_id == tok.pad_token_id
    samples = record_samples([record('which organ?', 'liver'), record('which organ?', 'on the left side')], processor, 4)[0]
    samples = [dict(s, image=0) for s in samples]
    total, n = batch_loss(model, Collator(tok.pad_token_id, torch.randn(1, 4, 32))(samples))
    assert n and torch.isfinite(total)
    assert len(tok) <= model.get_input_embeddings().weight.shape[0] and model.config.text_config.vocab_size == model.get_input_embeddings().weight.shape[0]
    save(model, processor, tmp_path/'again'); load(tmp_path/'again')


def test_an_end_that_is_no_special_token_is_one_all_the_same(tmp_path, capsys):
    processor = reader(turn(after="{{ '<end>\n' }}") + CUE, '</s>')
    processor.tokenizer.add_tokens(['<end>'])
    model, _ = tiny_model(processor)
    model.generation_config.eos_token_id = processor.tokenizer.convert_tokens_to_ids(['</s>', '<end>'])
    model.save_pretrained(tmp_path/'base'); processor.save_pretrained(tmp_path/'base')
    capsys.readouterr()
    model, processor = load(tmp_path/'base')
    assert not capsys.readouterr().out
    (s,), _ = record_samples([record('why?', 'left')], processor, 4)
    assert s['input_ids'][-1] == processor.tokenizer.convert_tokens_to_ids('<end>')


def test_a_folder_without_template_loads_as_before(tmp_path):
    model, processor = load(base(tmp_path, None, '</s>', ['</s>']))
    with pytest.raises(ValueError, match='no chat template'): record_samples([record('why?', 'left')], processor, 4)


def test_llava_1_5_learns_to_stop(tmp_path):
    "Its own template, completed, gives the ids of the same template with the end written in it."
    model, processor = load(base(tmp_path/'own', NO_END, '</s>', ['</s>']))
    ended = NO_END.replace("{{ c['text'] + ' ' }}{% endgeneration %}", "{{ c['text'] + '</s>' + ' ' }}{% endgeneration %}")
    twin, reads = load(base(tmp_path/'ended', ended, '</s>', ['</s>']))
    assert reads.chat_template == LISTED + ended and '{% generation %}' in processor.chat_template
    for texts in (('which organ?', 'liver'), ('which organ?', 'liver', 'where is it?', 'on the left side'), (item_question(ITEM), 'liver')):
        for image in ('a.png', None):
            r = dict(record(*texts)) if image else dict(id='r', conversations=said(*texts))
            assert record_samples([r], processor, 4) == record_samples([r], reads, 4)
    turns = [{'role': 'user', 'content': [{'type': 'image'}, {'type': 'text', 'text': 'which organ?'}]}]
    assert prompt_ids(processor, [turns], [1]) == prompt_ids(reads, [turns], [1])
    marked = reads.tokenizer.apply_chat_template([*turns, dict(role='assistant', content=[dict(type='text', text='liver')])], chat_template=processor.chat_template,
                                                 tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    assert processor.tokenizer.eos_token_id in [i for i, m in zip(marked['input_ids'], marked['assistant_masks']) if m]   # other trainers score the end, too
    named = complete_template(processor.tokenizer, 'llava_1_5', say=lambda line: None)[0]
    other = copy.deepcopy(processor); other.chat_template = named
    assert record_samples([record('which organ?', 'liver', 'where?', 'left')], other, 4) == record_samples([record('which organ?', 'liver', 'where?', 'left')], reads, 4)


def test_a_dated_template_is_the_same_tomorrow(tmp_path, monkeypatch):
    def on(day):
        class Clock(datetime):
            @classmethod
            def now(cls, tz=None): return cls(2031, 5, day)
        monkeypatch.setattr(chat_template_utils, 'datetime', Clock)
    on(1)
    folder, r = base(tmp_path/'base', *KINDS['dated'][:3]), record('which organ?', 'liver')
    model, processor = load(folder)
    save(model, processor, tmp_path/'saved')
    seen = lambda p: (record_samples([r], p, 4)[0], prompt_ids(p, ['why?'], [1]))
    first, text = seen(processor), LocalModel(folder).render('why?', 1)
    raw = reader(KINDS['dated'][0], '<|im_end|>')
    plain = seen(raw)
    assert 'May 2031' in raw.tokenizer.apply_chat_template([dict(role='user', content='why?')], tokenize=False), 'the clock is not patched'
    on(2)
    for p in (processor, load(folder)[1], load(tmp_path/'saved')[1]): assert seen(p) == first
    assert seen(raw) == plain, 'also where nothing was completed'
    assert LocalModel(folder).render('why?', 1) == text == LocalModel(tmp_path/'saved').render('why?', 1) and '2031' not in text
    assert '2031' not in (tmp_path/'saved/chat_template.jinja').read_text() and 'strftime_now(' not in (tmp_path/'saved/chat_template.jinja').read_text()
    assert frozen("{{ strftime_now(\"%Y-%m-%d\") }}") == '{{ "2024-07-26" }}'


@pytest.mark.parametrize('kind', ['another end', 'thinks in the last turn and when asked', 'dated', 'text alone', 'no end, text'])
def test_joined_parts_are_completed(kind, tmp_path):
    template, eos, stops, n, words = KINDS[kind]
    tok = reader(template, eos).tokenizer
    ids = tok.convert_tokens_to_ids(stops)
    lm = language(tmp_path/'lm', tok=tok, rows=len(tok) + 8, eos_token_id=ids[0])
    lines = []
    model, processor = join(tower(tmp_path/'clip', image_size=24), lm, say=lines.append)
    assert words in ' '.join(lines)
    assert exact(model, processor, record('which organ?', 'liver')) == 1
    assert exact(model, processor, record('which organ?', 'liver', 'where is it?', 'on the left side')) == n
    save(model, processor, tmp_path/'joined')
    stops = json.loads((tmp_path/'joined/generation_config.json').read_text())['eos_token_id']
    assert set(stops if isinstance(stops, list) else [stops]) == end_ids(model, processor.tokenizer)
    if kind == 'another end': assert end_ids(model, tok) == set(tok.convert_tokens_to_ids(['</s>', '<|im_end|>']))


def test_a_split_conversation_keeps_its_images_and_says_so(tmp_path, capsys):
    model, processor = load(base(tmp_path, *KINDS['thinks in the last turn'][:3]))
    r = dict(id='r', image=['a.png', 'b.png'], conversations=said('<image>\nwhich organ?', 'liver', '<image>\nand here?', 'kidney'))
    capsys.readouterr()
    samples, names = record_samples([r, record('why?', 'left')], processor, 4)
    assert [s['image'] for s in samples] == [0, [0, 1], 0] and names == ['a.png', 'b.png']
    assert '1 of 2 conversations became a sample for each answer' in capsys.readouterr().out
    mark = model.config.image_token_id
    assert [s['input_ids'].count(mark) for s in samples] == [4, 8, 4]
    with pytest.raises(ValueError, match="Record 'r': its chat template writes earlier turns otherwise"): record_samples([r], processor, 4, split=False)
    with pytest.raises(ValueError, match='is 2 samples'): encode(processor, [dict(role='user', content='a'), dict(role='assistant', content='b')]*2, 4)
    short, _ = record_samples([r], processor, 4, max_len=len(samples[0]['input_ids']) + 12)
    assert short[0] == samples[0] and '1 of 1 conversations were cut' in capsys.readouterr().out


def test_the_shipped_models_are_as_they_were(capsys):
    from conftest import REPO
    for name in ('base_tiny', 'tuned_tiny'):
        model, processor = load(REPO/'data'/name)
        assert processor.chat_template == (REPO/'data'/name/'chat_template.jinja').read_text() and not capsys.readouterr().out
        assert model.generation_config.eos_token_id == 2


@pytest.mark.parametrize('name', [n for n in TEMPLATES if n != 'plain'])
def test_the_templates_of_the_originals(name):
    processor = reader(TEMPLATES[name], '</s>')
    model, _ = tiny_model(processor)
    template, ends = complete_template(processor.tokenizer, name, [processor.tokenizer.eos_token_id], say=lambda line: None)
    processor.chat_template = processor.tokenizer.chat_template = template
    model.generation_config.eos_token_id = ends
    assert exact(model, processor, record('which organ?', 'liver', 'where is it?', 'on the left side')) == 1


# Every place that ends or cuts an answer does it alike

def spoken(tmp_path):
    "A thin model that ends, among others, with a token that is neither special nor the tokenizer's end; its answer up to there."
    model, processor = load(base(tmp_path/'m', KINDS['nothing to do'][0], '<|im_end|>', ['<|im_end|>']))
    image = Image.linear_gradient('L').convert('RGB').resize((24, 24))
    torch.manual_seed(3)
    with torch.no_grad(): [p.add_(torch.randn_like(p)) for n, p in model.named_parameters() if 'language_model.layers' in n and p.dim() == 2]   # says more than one word
    said = attention.generate(model, processor, image, 'which organ?')
    at = next(i for i, t in enumerate(said) if i > 1 and t not in said[:i])
    model.generation_config.eos_token_id = [processor.tokenizer.eos_token_id, said[at]]
    return model, processor, image, said[:at]


def test_maps_widgets_and_answers_end_at_every_end(tmp_path):
    model, processor, image, said = spoken(tmp_path)
    text = processor.tokenizer.decode(said).strip()
    assert answer(model, processor, [image], ['which organ?']) == [text]
    assert attention.generate(model, processor, image, 'which organ?') == said
    assert ''.join(widgets.stream_answer(model, processor, image, as_turns('which organ?'))).strip() == text


def test_a_registered_end_is_no_word_of_an_answer(tmp_path):
    model, processor, image, said = spoken(tmp_path)
    tok, stop = processor.tokenizer, processor.tokenizer.convert_tokens_to_ids('<|final|>')
    model.generation_config.eos_token_id = [tok.eos_token_id, stop]
    generate, model.generate = model.generate, lambda input_ids, **kw: torch.cat([input_ids, torch.tensor([[*said, stop]])], 1)
    assert stop not in tok.all_special_ids and attention.generate(model, processor, image, 'which organ?') == said


def test_a_drawn_answer_knows_its_end(tmp_path):
    model, processor, image, said = spoken(tmp_path)
    (one,), = sample(model, processor, [image], ['which organ?'], temperature=0)
    assert one['ids'] == said and one['end'] == model.generation_config.eos_token_id[1] != processor.tokenizer.eos_token_id
    judged = PolicyGradient(processor, [ITEM], tmp_path, n=2, temperature=0)
    image.save(tmp_path/'a.png'); model.generation_config.eos_token_id[1] = sample(model, processor, [image], [item_question(ITEM)], temperature=0)[0][0]['ids'][1]
    rolled = judged.rollout(model, [dict(input_ids=[5, 6, 7], labels=[IGNORE, IGNORE, 7], item=0)], 0)
    assert all(s['labels'][-1] == model.generation_config.eos_token_id[1] for s in rolled)


@pytest.mark.parametrize('kind', ['a space before the answer', 'nothing to do', 'thinks in the last turn'])
def test_a_given_answer_is_cut_as_it_was_trained(kind, tmp_path):
    template = TEMPLATES['llava_v1'] if kind == 'a space before the answer' else KINDS[kind][0]
    model, processor = load(base(tmp_path/'m', template, '<|im_end|>', ['<|im_end|>']))
    image = Image.linear_gradient('L').convert('RGB').resize((24, 24))
    (before, reply), = runs(record_samples([record('which organ?', 'liver')], processor, 4)[0][0])
    s = attention.encode_sample(processor, image, 'which organ?', 'liver')
    other = maps.other_question(processor, attention.encode_sample(processor, image, 'where?', 'left'), 'which organ?', 'liver')
    assert s.ids.tolist() == other.ids.tolist() == before + reply[:-1]
    assert s.n_answer == other.n_answer == len(reply) - 1
    seen = []
    ways = dict(seen=lambda model, samples, neutral: seen.extend(samples) or [[[0.]]]*len(samples))
    widgets.explain(model, processor, image, 'which organ?', 'liver', ways)
    assert seen[0].ids.tolist() == s.ids.tolist()
    assert explorer.explained(model, processor, image, 'which organ?', ['attention'], 'liver')['answer'] == s.answer


@pytest.mark.parametrize('own', [dict(truncation=True, max_length=30), dict(padding='max_length', max_length=300)])
def test_the_settings_of_a_tokenizer_cut_no_prompt(own, tmp_path):
    "Such as those that a training script leaves in tokenizer_config.json."
    model, processor = load(base(tmp_path/'m', KINDS['nothing to do'][0], '<|im_end|>', ['<|im_end|>'], lambda f: edit(f/'tokenizer_config.json', **own)))
    question, image = 'where is it on the left side? '*6, Image.linear_gradient('L').convert('RGB')
    asked, = prompt_ids(processor, [question], [1])
    asked = [t for t in asked for _ in range(4 if t == model.config.image_token_id else 1)]
    assert model_inputs(processor, [chat(processor, question)], [[image]])['input_ids'][0].tolist() == asked


def test_a_conversation_that_begins_with_an_answer_is_named(tmp_path):
    _, processor = load(base(tmp_path/'m', KINDS['strict roles'][0].replace("{% for m in messages %}{% if (", "{{ messages[0]['role'] and '' }}{% for m in messages %}{% if (", 1), '<|im_end|>', ['<|im_end|>']))
    talk = [{'from': 'gpt', 'value': 'hello'}, {'from': 'human', 'value': '<image>\nwhich organ?'}, {'from': 'gpt', 'value': 'liver'}]
    with pytest.raises(ValueError, match="'r'.*begins with an answer; remove it"): record_samples([dict(id='r', image='a.png', conversations=talk)], processor, 4)


def test_tokens_without_rows_are_said(tmp_path, capsys):
    def more(folder):
        tok = AutoTokenizer.from_pretrained(folder)
        tok.add_tokens([f'<extra_{i}>' for i in range(7)]); tok.save_pretrained(folder)
    model, processor = load(base(tmp_path/'m', KINDS['nothing to do'][0], '<|im_end|>', ['<|im_end|>'], more))
    n = len(processor.tokenizer)
    assert f"has {n - 7} rows of embeddings for the {n} tokens" in capsys.readouterr().out and len(model.get_output_embeddings().weight) >= n


def test_a_date_that_cannot_be_fixed_names_the_folder(tmp_path):
    folder = base(tmp_path/'m', KINDS['nothing to do'][0], '<|im_end|>', ['<|im_end|>'])
    (folder/'chat_template.jinja').write_text("{% set how = '%d' %}{{ strftime_now(how) }}" + KINDS['nothing to do'][0])
    with pytest.raises(ValueError, match=f"'{folder}'.*write the date into the template"): load(folder)
