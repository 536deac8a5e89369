"The report page, the controls, and a VQA set opened with its pictures, with good input and bad."
import json
import re
from html.parser import HTMLParser

import pandas as pd
import pytest
from PIL import Image

from llava_med.data.vqa_readers import open_vqa
from llava_med.data.browse import guess_title
from llava_med.evaluate.report_page import page, table, text, write_page
from llava_med.evaluate.reports import (NOTES, PUBLISHED, WARNINGS, drawn_examples, evaluation_report,
                                        in_words, looking_title, published_rows, row_table,
                                        score_figure, side_by_side, value_with_interval)
from llava_med.train.monitor import loss_words, order_words
from llava_med.core.runs import OutputError, test_data as data_folder
from llava_med.evaluate.pairing import CASES
from llava_med.evaluate.score_rows import log_credits, log_rows
from llava_med.evaluate.exact import ScoreError, control_predictions, score_table
from llava_med.evaluate.statistics import calibration_rows, calibration_table, paired_tests, test_rows as rows_of_tests

EVIL = '"><script>alert(1)</script><img src=https://x.org/a.png onerror=alert(2)></td></table>'
ITEMS = [dict(id=f'i{n}', images=[f'{n//2}.png'], question=('Is it?', 'What is it?')[n % 2], answer=('yes', 'a lung')[n % 2],
              answer_type=('CLOSED', 'OPEN')[n % 2], split='test', source='toy', options=[], twin_of=None,
              tags=dict(modality='mri', organ=None, question_type=EVIL if n % 2 else 'presence')) for n in range(8)]


def line(o, text='yes', model='m', condition='image', **more):
    return dict(dict(model=model, dataset='toy', split='test', condition=condition, item=o['id'], prompt=o['question'], text=text, error=None), **more)


class Reader(HTMLParser):
    "What a browser would make of a page: tags with their attributes, and the text."
    def __init__(self, html):
        super().__init__(); self.tags, self.words, self.open = [], '', []
        self.feed(html)
    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ('meta', 'img', 'link', 'br'): self.open.append(tag)
    def handle_endtag(self, tag): assert self.open.pop() == tag, tag
    def handle_data(self, data): self.words += data
    def all(self, tag): return [a for t, a in self.tags if t == tag]


@pytest.fixture
def report(tmp_path):
    "A report in which everything that a model or a file can say tries to break out."
    for i in range(4): Image.new('RGB', (20, 10), (9, 9, 60*i)).save(tmp_path/f'{i}.png')
    (tmp_path/'1.png').write_text('no picture')
    log = [line(o, EVIL, model=m) for o in ITEMS for m in ('base', EVIL)] + [line(o, o['answer'], EVIL, 'blank') for o in ITEMS]
    tables, odd = log_credits(ITEMS, log)
    rows = score_table(ITEMS, log + control_predictions(ITEMS, ITEMS, 'toy'), n_draws=50) + log_rows(tables, odd, 50)
    audit = [dict(check='images', shared=1, of=2, share=.5, example=EVIL, note=EVIL)]
    prompts = [dict(model=EVIL, prompt=EVIL, shots=0, questions=1, right=1., errors=0, chosen=True)]
    fn = evaluation_report(tmp_path/'r.html', rows, ITEMS, log, tmp_path, {EVIL: EVIL}, paired_tests(tables, n_draws=50), audit=audit, audit_note=EVIL,
                           prompts=prompts, dataset='toy', missing=[EVIL])
    return fn.read_text(encoding='utf-8')


def test_nothing_that_is_said_becomes_part_of_the_page(report):
    r = Reader(report)
    assert not r.all('script') and not r.open and EVIL in r.words
    assert all(a['src'].startswith('data:') and 'onerror' not in a for a in r.all('img'))
    assert "default-src 'none'" in report


def test_a_screen_reader_gets_through(report):
    r = Reader(report)
    assert r.all('html')[0]['lang'] == 'en' and len(r.all('h1')) == 1 and r.all('meta')[2]['name'] == 'viewport'
    assert len(r.all('table')) == len(r.all('caption')) and all(a.get('alt') for a in r.all('img'))
    assert all(a.get('scope') in ('col', 'row') for a in r.all('th'))
    ids = {a['id'] for _, a in r.tags if 'id' in a}
    assert {a['href'][1:] for a in r.all('a')} <= ids
    assert 'could not be opened' in r.words and 'prefers-color-scheme:dark' in report


def test_what_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(OutputError, match='fewer or smaller'): write_page(tmp_path/'a.html', 'x'*20, 10)
    for bad in ('<img alt="" src="http://x.org/a.png">', '<script>1</script>', '<link rel="s" href="a.css">'):
        with pytest.raises(OutputError, match='not inside the page'): write_page(tmp_path/'a.html', bad)
    assert not list(tmp_path.iterdir())
    assert '<h2' not in page('t', [('nothing', [None]), ('empty', [])])
    assert table(pd.DataFrame({'a': [1234], 'b': [float('nan')]}), 'c')['rows'] == [['1,234', '–']] and text('', 'a')['lines'] == ['a']


def test_no_published_row_without_its_warning():
    assert all(WARNINGS[r['warning']] for r in PUBLISHED) and all(NOTES.values())
    assert {r['set'] for r in PUBLISHED} == {'vqa_rad', 'slake', 'pathvqa'}
    d = published_rows('vqa_rad').set_index('method')
    assert d.loc['LLaVA-Med from LLaVA, tuned 15 epochs', ['open recall', 'closed']].tolist() == ['61.52', '84.19']
    assert 'not a recall' in d.loc['M2I2', 'to know'] and d.loc['M2I2', 'open recall'] == '–'
    assert len(published_rows('anything')) == len(PUBLISHED)


def test_odd_answers_are_counted_and_nothing_is_dropped():
    odd_ones = ['yes', None, 7, '', '<b>yes</b>', float('nan'), ['yes']]
    log = [line(o, t) for o, t in zip(ITEMS, odd_ones)] + [line(ITEMS[0], 'yes'), line(dict(ITEMS[0], id='z')), line(ITEMS[7], None, error='Timeout')]
    tables, odd = log_credits(ITEMS, log)
    (h, n), = odd.items()
    assert h == ('m', 'toy', 'test', 'image') and len(tables[h]) == 8
    assert {k: n[k] for k in ('null', 'number', 'empty', 'html', 'not_text', 'duplicate', 'extra', 'error', 'missing')} == dict(
        null=2, number=1, empty=1, html=1, not_text=1, duplicate=1, extra=1, error=1, missing=0)
    rows = log_rows(tables, odd, 50)
    assert {r['metric'] for r in rows if r['metric'].startswith('answers.')} == {f'answers.{k}' for k in CASES}
    short, _ = log_credits(ITEMS, log[:3])
    assert list(short) == [('m', 'toy', 'test (3 of 8)', 'image')]
    with pytest.raises(ScoreError, match='answered none of the 8 items'): log_credits(ITEMS, [line(dict(ITEMS[0], id='z'))])


def test_weak_rules_are_fooled_by_a_constant_and_strict_ones_are_not():
    tables, odd = log_credits(ITEMS, control_predictions([], ITEMS, 'toy'))
    got = {r['metric']: r['value'] for r in log_rows(tables, odd, 50) if r['model'] == 'always_yes_no'}
    assert got['llavamed_v1.closed_substring'] == 1 and got['strict.closed'] == got['strict'] == got['medevalkit.closed'] == 0


def test_nothing_to_compare_is_no_error():
    assert rows_of_tests(paired_tests({})) == [] and calibration_rows(calibration_table([], [])) == []
    assert score_figure([], ['m']) is None and drawn_examples([], {}) == {'right': [], 'wrong': []}


def test_a_set_is_opened_with_what_is_there(tmp_path):
    rows = [dict(o, regions=[]) for o in ITEMS]
    (tmp_path/'test.json').write_text(json.dumps(rows))
    Image.new('RGB', (4, 4)).save(tmp_path/'0.png')
    got = open_vqa(tmp_path)
    assert (got['missing'], got['train_is'], got['images_dir']) == (['1.png', '2.png', '3.png'], None, tmp_path)
    (tmp_path/'test.json').write_text(json.dumps(rows)[:-9])
    with pytest.raises(ValueError, match='test.json'): open_vqa(tmp_path)
    with pytest.raises(FileNotFoundError, match='no such file or folder'): open_vqa(tmp_path/'nothing')
    (tmp_path/'test.json').write_text(json.dumps(rows + rows[:1]))
    with pytest.raises(ValueError, match='i0'): open_vqa(tmp_path)


@pytest.mark.parametrize('name,there,of,train', [('vqa_rad', 31, 203, 'train'), ('slake', 11, 96, 'train')])
def test_real_sets_are_opened(name, there, of, train):
    data = data_folder()
    if data is None or not (data/name).is_dir(): pytest.skip(f'no real {name}: set LLAVA_MED_TESTDATA')
    said = []
    got = open_vqa(data/name, say=said.append)
    assert (got['name'], got['test_is'], got['train_is']) == (name, 'test', train)
    assert of - len(got['missing']) == there and f'{there} of {of} images found' in said[-1]
    assert bool(got['public']) == (name == 'vqa_rad')
    assert re.search(r'\d+ questions', said[0])


def test_a_real_set_without_one_image_is_refused():
    data = data_folder()
    if data is None or not (data/'pathvqa').is_dir(): pytest.skip('no real pathvqa: set LLAVA_MED_TESTDATA')
    with pytest.raises(FileNotFoundError, match='none of the 858 images'): open_vqa(data/'pathvqa')


# What has no interval, and titles that follow the numbers

def test_a_report_about_one_image_says_so_and_does_not_stop(tmp_path):
    Image.new('RGB', (20, 10)).save(tmp_path/'0.png')
    items = [dict(o, images=['0.png'], tags=dict(question_type='presence')) for o in ITEMS[:2]]
    log = [line(o, t, condition=c) for o in items for c, t in (('image', o['answer']), ('blank', 'no'))]
    tables, odd = log_credits(items, log)
    rows = score_table(items, log, n_draws=50) + log_rows(tables, odd, 50)
    tests = paired_tests(tables, n_draws=50)
    html = evaluation_report(tmp_path/'r.html', rows, items, log, tmp_path, {}, tests, dataset='toy').read_text(encoding='utf-8')
    assert '100.0 [–]' in html and NOTES['intervals'][:40] in html and NOTES['few'][:20] in html and '[nan' not in html and 'nan' not in Reader(html).words.split()
    assert 'not shown' in in_words(rows, 'm')[0] and '[– one image]' in row_table(rows, metric=['strict'])['value [95 %]'][0]
    assert '100.0 [–]' in side_by_side(rows, 'model', 'condition', metric='strict', slice='all').to_string()
    assert score_figure(rows, ['m'])['kind'] == 'figure'


def test_the_report_of_all_right_has_a_limit():
    log = [line(o, o['answer']) for o in ITEMS]
    row = next(r for r in score_table(ITEMS, log, n_draws=50) if r['slice'] == 'all' and r['metric'] == 'strict')
    assert value_with_interval(row) == '100.0 [47.3,\u00a0100.0]'   # of four images: .05 ** .25


@pytest.mark.parametrize('right,word', [([0]*90 + [1]*10, 'few'), ([1]*90 + [0]*10, 'most'), ([0, 1]*50, 'some'), ([0]*3, 'some'), ([1]*4, 'some')])
def test_how_many_can_be_guessed_follows_the_interval(right, word):
    assert f' {word} questions' in guess_title(right, range(len(right)))


def test_questions_of_one_record_are_no_evidence_for_few():
    assert ' some ' in guess_title([0]*90 + [1]*10, [i//50 for i in range(100)])


@pytest.mark.parametrize('gains,said', [
    ([(.1, .3), (.2, .4)], 'helps with 2 of 2'), ([(-.1, .3), (.2, .4)], 'helps with 1 of 2'), ([(-.1, .3)], 'not shown to help with any of 1'),
    ([(-.4, -.1), (-.1, .1)], 'and harms with 1'), ([('', '')], 'cannot be said')])
def test_whether_the_image_helps_follows_the_intervals(gains, said):
    assert said in looking_title({str(i): dict(low=a, high=b) for i, (a, b) in enumerate(gains)})


def test_a_loss_is_said_to_fall_only_if_it_does():
    falls = [dict(loss=3 - .05*i) for i in range(40)]
    assert 'falls from' in loss_words(falls) and 'rises from' in loss_words(falls[::-1])
    assert 'does not clearly fall' in loss_words([dict(loss=2 + (-1)**i) for i in range(40)]) and 'not finite' in loss_words([dict(loss=float('nan'))]*4)
    held = [dict(r, val_loss=abs(i - 10)/10 if i % 5 == 0 else '') for i, r in enumerate(falls)]
    assert 'validation loss from 0.00 at best to 2.50' in loss_words(held) and 'validation' not in loss_words(falls)


def test_what_is_learned_first_follows_the_curves():
    assert order_words(dict(a=[0, 1], b=[1, 1])) == 'b first at 90%, a last' and order_words(dict(a=[1, 1], b=[0, 0])) == 'a first at 90%, b not yet'


def test_a_set_of_training_questions_is_called_that(tmp_path, capsys):
    "A model that was tuned on them would be asked what it has learned."
    Image.new('L', (8, 8)).save(tmp_path/'a.png')
    (tmp_path/'q.csv').write_text('image,question,answer,split\na.png,which side?,left,train\na.png,how many?,two,train\n')
    its = open_vqa(tmp_path, say=print)
    assert its['split'] == its['test_is'] == 'train' and not its['train'] and len(its['items']) == 2
    assert 'a model tuned on this set has learned their answers' in capsys.readouterr().out
    row = dict(model='m', dataset='q', split='train', condition='image', slice='all', metric='strict', value=.5, low=.2, high=.8, n_items=10, n_images=12, n_clusters=12)
    assert 'training questions' in ' '.join(in_words([row], 'm')) and 'training questions' not in ' '.join(in_words([row | dict(split='test')], 'm'))
