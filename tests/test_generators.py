"Language models that write conversations: services that misbehave, processes that are killed, a real server, and the way into stage 2."
import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml

from llava_med.core import vocabulary
from llava_med.world import language, scenes
from llava_med.data.llm_api import EndpointError, EndpointGenerator, make_generator, token_bound
from llava_med.core.testing import LocalEndpoint
from llava_med.data.conversations import IMAGE, TemplateGenerator, fault, read_records, write_records
from llava_med.data.generators import Answers, AnswersError, LocalGenerator, TextGenerator, mend, read_prompts, read_talk, texts_of, written_records

REPO = Path(__file__).resolve().parents[1]
TINY = REPO/'data/base_tiny'
WORKERS = 4


def figure(seed):
    scene = scenes.sample_scene(seed)
    return dict(pmid=str(seed), fig_id='f1', caption=f'Case {seed}. ' + language.captions(scene, 'brief'), image=f'{seed}_f1.png', lang='en', licence='CC BY',
                mentions=[dict(text=t) for t in language.mentions(scene)], modalities={m: m == scene.modality for m in vocabulary.MODALITIES}, source='x')


def good(messages):
    "Writes well, and always the same about the same caption."
    caption = messages[-1]['content'].splitlines()[1]
    turns = TemplateGenerator((3, 4))(caption, [], np.random.default_rng(zlib.crc32(caption.encode())))
    return '\n'.join(f'User: {t.question}\nAssistant: {t.answer}' for t in turns)


def generator(url, file, **how):
    quick = dict(prices=(2, 8), cap=100, workers=WORKERS, backoff=.01, timeout=(2, 1), per_minute=1e6, n_examples=1, say=lambda s: None)
    return EndpointGenerator(url, 'a model', file, **quick | how)


def run(figures, g):
    "Records and rows."
    rows = []
    return list(written_records(figures, g, note=rows.append)), rows


@pytest.fixture(autouse=True)
def no_key(monkeypatch): monkeypatch.delenv('OPENAI_API_KEY', raising=False)


# Post-processing, with the defects of LLaVA-Med's

FIGURES = [figure(s) for s in range(3)]


class Says(TextGenerator):
    "Says what it is told to."
    name = 'says'
    def __init__(self, text, folder, finish='stop'):
        super().__init__('says', folder/f'{zlib.crc32(text.encode())}.jsonl')
        self.text, self.finish = text, finish
    def ask(self, jobs):
        for k in jobs: self.answers.add(k, 'answered', cost=0., text=self.text, finish=self.finish)


@pytest.mark.parametrize('before', [1., 0.])
def test_the_image_moves_on_when_the_first_pair_is_dropped(before, tmp_path):
    text = "User: What is shown? <image>\nAssistant: I'm sorry, but I cannot see the image.\nUser: Which organ?\nAssistant: The liver <image>.\nUser: And the edge?\nAssistant: Sharp."
    records = list(written_records(FIGURES, Says(text, tmp_path), image_before=before))
    for r in records:
        assert [t['value'] for t in r['conversations']] == [f'{IMAGE}\nWhich organ?' if before else f'Which organ?\n{IMAGE}', 'The liver .', 'And the edge?', 'Sharp.']
        assert fault(r) == '' and r['generator']['saw'] == ['caption', 'mentions'] and r['generator']['model'] == 'says'
    assert write_records(tmp_path/'instruct.json', records) == 3 == len(read_records(tmp_path/'instruct.json'))


ACRONYMS = ('MRI shows Crohn disease', 'mRNA is expressed in HER2-positive cells', 'pH and pCO2 are low', 'p53 is strong in the SCC', 'T2-weighted FLAIR is bright in MS', 'α-SMA stains the wall', 'CD34+ vessels, H&E and Ki-67')
POINTERS = ('According to the caption, {}', 'Based on the provided text, {}', 'As mentioned in the figure legend, {}', 'The caption states that {}', '{}, as described in the article', '{} (as stated in the caption)',
            'As the picture shows nothing else, {}', '{} (see Figure 2)', 'In this study, {}')


@pytest.mark.parametrize('pointer', POINTERS)
@pytest.mark.parametrize('said', ACRONYMS)
def test_a_pointer_goes_and_an_acronym_stays(said, pointer):
    got = mend(pointer.format(said) + '.')
    if 'picture' in pointer: assert got == pointer.format(said) + '.', 'nothing to mend'
    else: assert got == said + '.'


def test_sentences_without_a_pointer_are_left_alone():
    for s in ('it is a cT2 tumour, i.e. 3 cm.', 'iPSC  colonies,  two of them.', 'The description of pain was given by a figure-of-eight shape.', 'A report-like text in the corner reads L.', 'In the context of trauma, a fracture.'):
        assert mend(s) == s


@pytest.mark.parametrize('text,finish,what,says', [
    ('', 'stop', 'malformed', 'empty'), ('  \n', 'length', 'cut off', 'empty'), ("I'm sorry, but I can't assist with that.", 'stop', 'refusal', "can't assist"),
    ('A CT of the liver.', 'stop', 'malformed', 'No line begins'), ('User: What?', 'stop', 'malformed', "'What?' has no answer"), ('Assistant: A CT.', 'stop', 'malformed', 'follows no question'),
    ('User: \nAssistant: A CT.', 'stop', 'malformed', 'question is empty'), ('User: What?\nAssistant:', 'stop', 'malformed', 'answer is empty'), ('User: What?\nAssistant: It is a', 'length', 'cut off', "'It is a'"),
    ('User: What?\nAssistant: The article names it.', 'stop', 'reveals', "'The article'"), ('User: What does the caption say?\nAssistant: A CT.', 'stop', 'reveals', 'caption'),
    ('User: What?\nAssistant: The size is not specified in the text.', 'stop', 'refusal', 'not specified'), ('NOTHING', 'stop', 'nothing', 'nothing visible'), ('x', 'content_filter', 'refusal', 'filter'),
    ('User: What?\nUser: Where?\nUser: Why?', 'stop', 'malformed', "'What?' has no answer")])
def test_what_cannot_be_used_is_a_row_with_record_and_reason(text, finish, what, says, tmp_path):
    records, rows = run(FIGURES, Says(text, tmp_path, finish))
    assert records == [] and [r['record'] for r in rows if r is not None][::len(rows)//3] == ['0_f1', '1_f1', '2_f1']
    assert rows[0]['what'] == what and says in rows[0]['reason'] and '\n' not in rows[0]['reason'] and rows[0]['reason'].endswith('.')


def test_nothing_of_an_answer_goes_missing_without_a_row():
    "Random texts: every question that was asked is a pair or has a row."
    rng = random.Random(0)
    lines = ['User: What is it?', 'User: Where is {}?', 'Assistant: A CT.', 'Assistant: According to the caption, {}.', 'assistant: I am sorry, I cannot see the image.', 'and more', '', '**User**: Why {}?', '```', 'Human: How many {}?', 'Assistant:']
    for i in range(500):
        text = '\n'.join(rng.choice(lines).format(k) for k in range(rng.randint(0, 12)))
        pairs, rows = read_talk(text, rng.choice(['stop', 'length']))
        asked = len(re.findall(r'^(?:\*\*)?(?:User|Human)', text, re.M))
        assert len(pairs) + len({r['turn'] for r in rows if r['turn'] and r['what'] != 'mended'}) >= asked, text
        assert all(q.strip() and a.strip() and 'caption' not in a and 'sorry' not in a and IMAGE not in q + a for q, a in pairs)


def test_prompts_are_whole_and_can_be_replaced(tmp_path):
    text = (REPO/'llava_med/data/prompts.yaml').read_text()
    p = read_prompts()
    assert {e['conversation'] == 'NOTHING' for e in p.examples} == {True, False}
    for e in p.examples:
        pairs, rows = read_talk(e['conversation'])
        assert e['conversation'] == 'NOTHING' or 3 <= len(pairs) <= 4 and not rows
    d = yaml.safe_load(text)
    d['examples'][0]['conversation'] = "User: What does the caption say?\nAssistant: I'm sorry."
    (tmp_path/'mine.yaml').write_text(yaml.safe_dump(d))
    with pytest.raises(ValueError, match=r'mine.yaml has an example \(1\)'): read_prompts(tmp_path/'mine.yaml')
    (tmp_path/'mine.yaml').write_text(text.replace('A made-up', 'A').replace('Three or four', 'Five'))
    with LocalEndpoint(good) as e:
        for prompts in ('', tmp_path/'mine.yaml'): run(FIGURES, generator(e.url, tmp_path/'a.jsonl', prompts=prompts))
        assert sum(e.asked.values()) == 6 and 'Five questions' in e.bodies[-1]['messages'][0]['content'], 'another prompt is another question'


# Services that misbehave

@pytest.mark.parametrize('stream', [False, True])
@pytest.mark.parametrize('kind,n,says', [
    (429, 9, 'answers 429'), ((429, 1), 1, ''), ((429, 7200), 1, 'left alone for 7200 s'), (500, 9, 'answers 500'), (500, 2, ''), ('half', 9, 'unreadable|breaks off'), ('half', 1, ''), ('endless', 1, 'without end'),
    ('drop', 9, 'broke off'), ('drop', 2, ''), ('silent', 9, 'silent for'), ('empty', 1, 'is empty'), ('error', 9, 'fell over'), (400, 1, 'answers 400'), (413, 1, 'answers 413')])
def test_each_fault_ends_in_a_sentence_or_leaves_no_trace(kind, n, says, stream, tmp_path):
    figures = FIGURES
    with LocalEndpoint(good) as e:
        calm, _ = run(figures, generator(e.url, tmp_path/'calm.jsonl'))
        e.asked.clear()
        e.faults = {figures[1]['caption']: [kind]*n}
        began = time.monotonic()
        records, rows = run(figures, generator(e.url, tmp_path/'a.jsonl', tries=3, stream=stream, timeout=(1, .3), limit=100_000))
        tries = next(k for q, k in e.asked.items() if figures[1]['caption'] in q)
    if not says: assert records == calm and rows == [] and tries == n + 1
    else:
        assert records == [calm[0], calm[2]] and [r['record'] for r in rows] == ['1_f1']
        assert re.search(says, rows[0]['reason']) and rows[0]['reason'].endswith('.') and '\n' not in rows[0]['reason']
        assert tries == (3 if n == 9 else 1)
    if kind == (429, 1): assert time.monotonic() - began > 1, 'Retry-After is waited for'
    assert time.monotonic() - began < 15


def test_a_refusal_is_kept_and_not_paid_again(tmp_path):
    with LocalEndpoint(lambda m: "I'm sorry, but I can't help with that.") as e:
        for _ in range(2):
            records, rows = run(FIGURES, generator(e.url, tmp_path/'a.jsonl'))
            assert records == [] and {r['what'] for r in rows} == {'refusal'} and sum(e.asked.values()) == 3


def test_nobody_asks_before_the_time_that_the_service_named(tmp_path):
    times, lock = [], threading.Lock()
    def say(messages):
        with lock: times.append(time.monotonic())
        return good(messages)
    with LocalEndpoint(say) as e:
        e.faults = {FIGURES[0]['caption']: [(429, 1)]}
        began = time.monotonic()
        run([figure(s) for s in range(12)], generator(e.url, tmp_path/'a.jsonl', workers=4))
    assert len(times) == 12 and 3 <= sum(t - began < .9 for t in times) <= 7, 'those that were under way, and then silence'


def test_limits_are_kept(tmp_path):
    figures, times = [figure(s) for s in range(12)], []
    def say(messages):
        times.append(time.monotonic())
        return good(messages)
    def span(file, workers=12, **limits):
        "Seconds between the first question and the last, as the service sees them."
        times.clear()
        g = generator(e.url, tmp_path/file, workers=workers)
        for k, v in limits.items(): setattr(g, k, v)
        assert len(run(figures, g)[0]) == 12 == len(times)
        return max(times) - min(times)
    with LocalEndpoint(say, delay=.05) as e:
        span('a.jsonl', workers=3)
        assert e.most == 3
        g = generator(e.url, tmp_path/'none.jsonl')
        bound = [token_bound(g.messages(*texts_of(f))) + g.most for f in figures]
        assert span('b.jsonl') < 1.2 < 1.5 < span('c.jsonl', per_minute=60*11/1.7) < 4
        assert 1.5 < span('d.jsonl', tokens_per_minute=60*sum(bound)/1.9) < 4


@pytest.mark.parametrize('stream', [False, True])
def test_the_cap_is_never_passed_and_the_ledger_adds_up(stream, tmp_path):
    figures, spent = [figure(s) for s in range(30)], []
    with LocalEndpoint(good, delay=.01) as e:
        e.faults = {'': ['half', 500, 'drop', 429]*4}
        for cap in (.02, .05, .09, 100):
            g = generator(e.url, tmp_path/'a.jsonl', cap=cap, workers=8, stream=stream)
            records, rows = run(figures, g)
            ledger = Answers(tmp_path/'a.jsonl').ledger()
            spent.append(ledger['cost'])
            assert ledger == g.answers.ledger() and ledger['cost'] <= cap and len(records) == ledger['answered']
            if cap < 100: assert len(records) < 30 and all('cap' in r['reason'] and r['what'] == 'no answer' for r in rows if 'not asked' in r['reason'])
        assert len(records) == 30 and spent == sorted(spent) and ledger['asked'] == sum(e.asked.values()) == ledger['answered'] + ledger['failed']
    lines = [json.loads(x) for x in (tmp_path/'a.jsonl').read_text().splitlines()]
    assert abs(sum(x.get('cost', 0) for x in lines) - ledger['cost']) < 1e-5
    broken = [x for x in lines if x['event'] == 'failed']
    assert all(bool(x['cost']) == ('answers 500' not in x['reason'] and 'answers 429' not in x['reason']) for x in broken), 'what may have been billed counts with its bound'


def test_an_answer_without_usage_counts_with_its_bound(tmp_path, monkeypatch):
    monkeypatch.setattr('llava_med.core.testing._pieces', lambda text, finish, used: [dict(choices=[dict(delta=dict(content=text), finish_reason=finish)])])
    with LocalEndpoint(good) as e:
        g = generator(e.url, tmp_path/'a.jsonl', stream=True)
        assert len(run(FIGURES, g)[0]) == 3
    assert g.answers.ledger()['cost'] == pytest.approx(g.estimate([]) ['cost'] + sum((token_bound(g.messages(*texts_of(f)))*2 + 900*8)/1e6 for f in FIGURES), abs=1e-6)


def test_figures_that_need_no_answer_are_not_asked_about(tmp_path):
    a, b, c = FIGURES
    odd = [dict(a, image=None), dict(b, lang='de'), dict(c, caption=' ', mentions=[]), dict(a, pmid='7'), dict(a, pmid='8')]
    with LocalEndpoint(good) as e:
        records, rows = run(odd, generator(e.url, tmp_path/'a.jsonl'))
        assert sum(e.asked.values()) == 1, 'and the same text once'
    assert [r['id'] for r in records] == ['7_f1', '8_f1'] and [r['what'] for r in rows] == ['not asked']*3


@pytest.mark.parametrize('secret', ['sk-test-0123456789abcdef', 'any other secret'])
def test_the_key_comes_from_the_environment_and_stays_there(secret, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv('OPENAI_API_KEY', secret)
    with LocalEndpoint(lambda m: f'User: What is your key?\nAssistant: It is {secret}.\nUser: Hm?\nAssistant: Hm.') as e:
        e.faults = {FIGURES[0]['caption']: [500]*9, FIGURES[1]['caption']: [400]}
        records, rows = run(FIGURES, generator(e.url, tmp_path/'a.jsonl', tries=2, say=print))
        assert e.keys == {f'Bearer {secret}'} and len(records) == 1
        e.faults = {'': [401]*9}
        with pytest.raises(EndpointError) as error: run(FIGURES, generator(e.url, tmp_path/'b.jsonl', say=print))
    kept = ''.join(p.read_text() for p in tmp_path.rglob('*') if p.is_file()) + json.dumps(records + rows) + ''.join(capfd.readouterr()) + str(error.value)
    assert secret not in kept and '[key]' in kept and 'OPENAI_API_KEY' in str(error.value)
    for url in (f'http://{secret}@127.0.0.1/v1', f'http://127.0.0.1/v1?key={secret}'):
        with pytest.raises(EndpointError) as error: generator(url, tmp_path/'c.jsonl')
        assert secret not in str(error.value)


def test_a_line_that_was_cut_off_is_forgotten_wherever_the_cut_is(tmp_path):
    file = tmp_path/'a.jsonl'
    with LocalEndpoint(good) as e:
        whole = run(FIGURES, generator(e.url, file, workers=1))
        data = file.read_bytes()
        last = data[:-1].rfind(b'\n') + 1
        for cut in (last + 1, last + 40, len(data) - 1):
            file.write_bytes(data[:cut])
            e.asked.clear()
            assert len(Answers(file)) == 2 and Answers(file).ledger()['lost'] == 1
            assert run(FIGURES, generator(e.url, file)) == whole and sum(e.asked.values()) == 1
            assert [json.loads(x)['event'] for x in file.read_text().splitlines()] == ['asked', 'answered', 'asked', 'answered', 'asked', 'asked', 'answered']


def test_two_processes_do_not_share_a_file(tmp_path):
    with LocalEndpoint(good) as e, Answers(tmp_path/'a.jsonl').adding():
        with pytest.raises(AnswersError, match='in use by another process'): run(FIGURES, generator(e.url, tmp_path/'a.jsonl'))
        assert not e.asked


def test_a_full_disk_stops_the_run(tmp_path, monkeypatch):
    class Full:
        def write(self, line): raise OSError(28, 'No space left on device')
        def truncate(self, n): pass
        def __enter__(self): return self
        def __exit__(self, *exc): pass
    real = open
    monkeypatch.setattr('llava_med.data.generators.open', lambda p, mode='r', **kw: Full() if mode == 'ab' else real(p, mode, **kw), raising=False)
    with LocalEndpoint(good) as e, pytest.raises(OSError, match='[Ff]ree some space'): run(FIGURES, generator(e.url, tmp_path/'a.jsonl'))
    assert not e.asked


def test_ctrl_c_stops_at_once_and_nothing_is_lost(tmp_path, monkeypatch):
    from llava_med.data import llm_api
    def two(iterable, *args, **kw):
        for i, x in enumerate(iterable):
            if i == 2: raise KeyboardInterrupt
            yield x
    with LocalEndpoint(good, delay=.2) as e:
        with monkeypatch.context() as m:
            m.setattr(llm_api, 'progress', two)
            began = time.monotonic()
            with pytest.raises(KeyboardInterrupt): run([figure(s) for s in range(40)], generator(e.url, tmp_path/'a.jsonl'))
            assert time.monotonic() - began < 2
        stored = len(Answers(tmp_path/'a.jsonl'))
        assert 2 < stored < 12
        time.sleep(.3)
        n = sum(e.asked.values())
        assert len(run([figure(s) for s in range(40)], generator(e.url, tmp_path/'a.jsonl'))[0]) == 40 and sum(e.asked.values()) - n == 40 - stored


# Killed

N_KILLED = 60


def generate(url, folder):
    "What the process that is killed does."
    folder, rows = Path(folder), []
    g = generator(url, folder/'answers.jsonl', tries=9)
    write_records(folder/'instruct.json', written_records([figure(s) for s in range(N_KILLED)], g, note=rows.append))
    (folder/'rows.json').write_text(json.dumps(rows))


def test_killed_ten_times_it_ends_with_the_same_records_and_pays_once(tmp_path, forks):
    rng, server = random.Random(5), forks('llava_med.data.llm_api', 'test_generators')
    figures = [figure(s) for s in range(N_KILLED)]
    mixed = lambda: {figures[k]['caption']: f for k, f in {3: [500], 9: ['half'], 17: [429], 25: ['drop'], 33: ['empty']}.items()}
    for d in ('calm', 'out'): (tmp_path/d).mkdir()
    with LocalEndpoint(good, delay=.03) as e:
        e.faults = mixed()
        generate(e.url, tmp_path/'calm')
        e.asked.clear(); e.served.clear(); e.faults = mixed()
        kills, lost, again, before, stored = 0, 0, [], Counter(), set()
        marks = sorted(rng.sample(range(2, N_KILLED - 20), 10))
        while True:
            p = server.Process(target=generate, args=(e.url, str(tmp_path/'out')))
            p.start()
            if kills < 10:
                while len(e.served) < marks[kills] and p.is_alive(): time.sleep(.001)
                time.sleep(rng.uniform(0, .04))
                if p.is_alive(): os.kill(p.pid, signal.SIGKILL); kills += 1
            p.join(60)
            time.sleep(.08)   # what is under way arrives
            again += [q for q in stored if e.asked[q] > before[q]]
            kept = Answers(tmp_path/'out/answers.jsonl')
            g = generator(e.url, tmp_path/'out/answers.jsonl')
            stored = {g.messages(*texts_of(f))[-1]['content'] for f in figures if g.key(*texts_of(f)) in kept}
            before = Counter(e.asked)
            if p.exitcode == 0: break
            assert p.exitcode == -signal.SIGKILL and not (tmp_path/'out/instruct.json').exists()
        assert kills == 10
        assert again == [], 'a stored answer was asked for again'
        ledger = kept.ledger()
        assert N_KILLED < sum(e.asked.values()) <= N_KILLED + 4 + 10*WORKERS, 'every question, four faults, and what was under way'
        assert ledger['answered'] == N_KILLED and 0 < ledger['lost'] <= 10*WORKERS
    for f in ('instruct.json', 'rows.json'): assert (tmp_path/'out'/f).read_bytes() == (tmp_path/'calm'/f).read_bytes()
    assert len(read_records(tmp_path/'out/instruct.json')) == N_KILLED - 1


# Into stage 2

def test_records_of_a_service_become_samples_of_stage_2(tmp_path):
    from transformers import AutoTokenizer
    from llava_med.train.batches import IGNORE, record_samples
    figures = [figure(s) for s in range(20)]
    with LocalEndpoint(good) as e: records, rows = run(figures, generator(e.url, tmp_path/'a.jsonl', stream=True))
    assert rows == [] and write_records(tmp_path/'instruct.json', records) == 20
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    samples, names = record_samples(read_records(tmp_path/'instruct.json'), tokenizer)
    assert names == [f['image'] for f in figures]
    for r, s in zip(records, samples):
        assert list(r)[:4] == ['id', 'image', 'domain', 'conversations'] and len(r['conversations']) >= 4
        scored = tokenizer.decode([t for t, l in zip(s['input_ids'], s['labels']) if l != IGNORE], skip_special_tokens=True)
        assert scored.replace(' ', '') == ''.join(t['value'] for t in r['conversations'][1::2]).replace(' ', ''), 'answers are scored, and nothing else'
        assert s['input_ids'].count(tokenizer.convert_tokens_to_ids(IMAGE)) == 64


# Real models

def tiny_llama(folder, template):
    "A random Llama with a word tokenizer, as a chat model."
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    words = ['<pad>', '<unk>', '</s>', 'User', 'Assistant', ':', '.', 'lung', 'liver', '?', 'A', 'mass']
    t = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token='<unk>'))
    t.pre_tokenizer = pre_tokenizers.Whitespace()
    tok = PreTrainedTokenizerFast(tokenizer_object=t, unk_token='<unk>', eos_token='</s>')
    tok.chat_template = template
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=4000, eos_token_id=2, initializer_range=1.)).save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder


PLAIN = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}"
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + PLAIN


@pytest.mark.parametrize('template', [PLAIN, NO_SYSTEM])
def test_a_local_chat_model_stops_and_goes_on_with_the_same_words(template, tmp_path, monkeypatch):
    figures = [figure(s) for s in range(7)]
    make = lambda file, **how: make_generator('local', str(tiny_llama(tmp_path/'llama', template)), tmp_path/file, device='cpu', batch_size=3, settings=dict(max_tokens=6), n_examples=1, **how)
    whole = make('whole.jsonl')
    records, rows = run(figures, whole)
    assert len(whole.answers) == 7 and {r['record'] for r in rows} == {f"{s}_f1" for s in range(7)}
    add, left = Answers.add, [4]
    def fails(self, *args, **kw):
        left[0] -= 1
        if left[0] < 0: raise RuntimeError('killed')
        add(self, *args, **kw)
    with monkeypatch.context() as m:
        m.setattr(Answers, 'add', fails)
        with pytest.raises(RuntimeError, match='killed'): run(figures, make('parts.jsonl'))
    parts = make('parts.jsonl')
    assert len(parts.answers) == 4
    assert run(figures, parts) == (records, rows)
    said = lambda g: {k: (r['text'], r['finish'], r['completion_tokens']) for k in g.answers.at for r in [g.answers.get(k)]}
    assert said(parts) == said(whole) and len(set(said(whole).values())) > 1
    monkeypatch.setattr(LocalGenerator, 'load', lambda self: pytest.fail('loaded for nothing'))
    assert run(figures, make('whole.jsonl')) == (records, rows)


def test_a_batch_says_what_each_would_say_alone(tmp_path):
    "Padding changes nothing that can be seen."
    figures, folder, texts = [figure(s) for s in range(6)], tiny_llama(tmp_path/'llama', PLAIN), []
    for size in (1, 6):
        g = LocalGenerator(folder, tmp_path/f'{size}.jsonl', 'cpu', size, settings=dict(max_tokens=5))
        g.prepare(figures)
        texts.append([g.answers.get(g.key(*texts_of(f)))['text'] for f in figures])
    assert texts[0] == texts[1]


def test_a_local_chat_model_asks_alike_every_day_and_stops_at_the_end_of_its_template(tmp_path, monkeypatch):
    from datetime import datetime
    from transformers.utils import chat_template_utils
    dated = "{{ strftime_now('%d %b %Y') }} {% for m in messages %}{{ m['role'] }} : {{ m['content'] }} ? {% endfor %}{% if add_generation_prompt %}Assistant : {% endif %}"
    folder, asked = tiny_llama(tmp_path/'llama', [dict(name='default', template=dated), dict(name='tool_use', template='{{ tools }}')]), []
    words = json.loads((folder/'tokenizer_config.json').read_text())
    words['added_tokens_decoder'] = {**words.get('added_tokens_decoder', {}), '9': dict(content='?', special=True, normalized=False, lstrip=False, rstrip=False, single_word=False)}
    file = json.loads((folder/'tokenizer.json').read_text())
    file['added_tokens'].append(dict(id=9, content='?', special=True, normalized=False, lstrip=False, rstrip=False, single_word=False))
    (folder/'tokenizer.json').write_text(json.dumps(file)); (folder/'tokenizer_config.json').write_text(json.dumps(words))
    for day in (1, 2):
        class Clock(datetime):
            @classmethod
            def now(cls, tz=None): return cls(2030, 1, day)
        monkeypatch.setattr(chat_template_utils, 'datetime', Clock)
        local = LocalGenerator(folder, tmp_path/f'{day}.jsonl', 'cpu')
        tok, model = local.load()
        asked.append((tok.chat_template, local.ids(tok, [dict(role='user', content='lung')])))
        assert model.generation_config.eos_token_id == [2, 9] and '2030' not in tok.decode(asked[-1][1])
    assert asked[0] == asked[1] and 'strftime_now' not in asked[0][0]


def test_a_local_chat_model_is_asked_the_whole_question_or_none(tmp_path):
    lists = "{% for m in messages %}{{ m['role'] }} : {% for c in m['content'] | selectattr('type', 'equalto', 'text') %}{{ c['text'] }} {% endfor %}{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}<image>{% endfor %}{% endfor %}"
    ask = [dict(role='system', content='A mass'), dict(role='user', content='lung ?')]
    local = LocalGenerator(tiny_llama(tmp_path/'llama', lists), tmp_path/'x.jsonl', 'cpu')
    tok, _ = local.load()
    assert tok.decode(local.ids(tok, ask)).count('lung ?') == 1 == tok.decode(local.ids(tok, ask)).count('A mass')
    tok.chat_template = "{% for m in messages %}{{ m['role'] }} : {% endfor %}"
    with pytest.raises(ValueError, match="leaves out what is asked: 'A mass"): local.ids(tok, ask)


@contextlib.contextmanager
def served(folder, log):
    "`transformers serve` on loopback; yields its address."
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    env = dict(os.environ, HF_HUB_OFFLINE='1', OMP_NUM_THREADS='1')
    with open(log, 'w') as f:
        p = subprocess.Popen([Path(sys.executable).with_name('transformers'), 'serve', str(folder), '--host', '127.0.0.1', '--port', str(port), '--device', 'cpu'], stdout=f, stderr=f, env=env)
        try:
            for _ in range(600):
                assert p.poll() is None, log.read_text()[-2000:]
                with contextlib.suppress(OSError):
                    with urllib.request.urlopen(f'http://127.0.0.1:{port}/health', timeout=1): break
                time.sleep(.1)
            yield f'http://127.0.0.1:{port}/v1'
        finally:
            p.terminate()
            p.wait(20)


@pytest.mark.slow
def test_transformers_serve(tmp_path):
    "Whole answers, streams and errors of the real component."
    figures = [figure(s) for s in range(4)]
    with served(TINY, tmp_path/'log') as url:
        asked = dict(prices=None, cap=0, n_examples=0, timeout=(5, 60), settings=dict(max_tokens=24), tries=2)
        texts = []
        for stream in (False, True):
            g = EndpointGenerator(url, str(TINY), tmp_path/f'{stream}.jsonl', stream=stream, say=lambda s: None, **asked)
            records, rows = run(figures, g)
            assert g.failed == {} and [r['record'] for r in rows] == [f'{s}_f1' for s in range(4)] and {r['what'] for r in rows} <= {'malformed', 'cut off'}
            kept = [g.answers.get(g.key(*texts_of(f))) for f in figures]
            for r in kept: assert r['text'].strip() and r['completion_tokens'] <= 24 and (r['finish'] == 'length') == (r['completion_tokens'] == 24) and r['prompt_tokens'] > 500
            assert 'length' in {r['finish'] for r in kept}
            assert g.answers.ledger()['cost'] == 0
            texts.append([r['text'] for r in kept])
        assert texts[0] == texts[1] and len(set(texts[0])) > 1
        local = LocalGenerator(TINY, tmp_path/'local.jsonl', 'cpu', 1, n_examples=0, settings=dict(max_tokens=24))
        local.prepare(figures)
        assert [local.answers.get(local.key(*texts_of(f)))['text'].strip() for f in figures] == [t.strip() for t in texts[0]], 'the same model on this machine says the same'
        with pytest.raises(EndpointError, match='in a row got no answer.*400'): run(figures, EndpointGenerator(url, 'another model', tmp_path/'b.jsonl', give_up=2, say=lambda s: None, **asked))
        with pytest.raises(EndpointError, match='404.*usually ends in /v1'): run(figures, EndpointGenerator(url + '/v2', str(TINY), tmp_path/'c.jsonl', say=lambda s: None, **asked))
        records, rows = run(figures, EndpointGenerator(url, str(TINY), tmp_path/'d.jsonl', say=lambda s: None, **asked | dict(settings=dict(max_tokens=24, nonsense=1))))
        assert records == [] and len(rows) == 4 and all('answers 422' in r['reason'] and 'nonsense' in r['reason'] for r in rows)
    records, rows = run(figures, EndpointGenerator(url, str(TINY), tmp_path/'e.jsonl', backoff=.01, say=lambda s: None, **asked))
    assert records == [] and all('cannot be reached' in r['reason'] for r in rows), 'nobody is there any more'


@pytest.mark.slow
def test_the_pipeline_trains_on_what_a_service_wrote(tmp_path):
    "One parameter changes who writes; the answers outlive the step, and stage 2 learns from the records."
    from llava_med.lab.commands import main
    outputs = Path(os.environ['LLAVA_MED_OUTPUTS'])
    with LocalEndpoint(lambda m: good(m) or 'NOTHING') as e:
        words = ['run', 'smoke', '--set', '1_data_prep.n_figures=60', '1_data_prep.generator=endpoint', '1_data_prep.generator_model=m', f'1_data_prep.endpoint={e.url}', '1_data_prep.price_in=2', '1_data_prep.price_out=8']
        d = outputs/'smoke/1_data_prep'
        assert main([*words, '--only', '1']) == 1 and not e.asked, 'a cap of 0 buys nothing'
        assert main([*words, '1_data_prep.spending_cap=5', '--only', '1', '2', '3']) == 0
        records, n = read_records(d/'instruct.json'), sum(e.asked.values())
        figures = [json.loads(x) for x in (d/'figures.jsonl').open()]
        dropped = [json.loads(x) for x in (d/'instruct_dropped.jsonl').open()]
        assert n == len(figures) and {r['generator']['name'] for r in records} == {'endpoint'} and len(records) > 20
        assert {r['id'] for r in records} | {r['record'] for r in dropped} == {f['id'] for f in figures}
        ledger = json.loads((d/'answers_ledger.json').read_text())
        assert ledger['answered'] == n and 0 < ledger['cost'] <= 5
        assert (outputs/'smoke/3_stage2_tuning/model/model.safetensors').exists()
        before = (d/'instruct.json').read_bytes()
        assert main([*words, '1_data_prep.spending_cap=6', '--only', '1']) == 0
        assert sum(e.asked.values()) == n and (d/'instruct.json').read_bytes() == before
