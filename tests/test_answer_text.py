"What a model's text says, and which signs decide it."
from collections import Counter

import pytest

from llava_med.core.runs import write_jsonl
from llava_med.evaluate.answer_text import ODD_TEXT, answer_text, framed, plain, split_thoughts, spoken
from llava_med.evaluate.exact import score_table, strict, strict_normalise
from llava_med.evaluate.score_rows import log_credits, score_answers
from llava_med.evaluate.scorers import SCORERS

THOUGHTS = ['<think>Yes or no?</think>\n\nNo', 'Yes or no?</think> No', '<thinking>yes</thinking>No', '<THINK>yes</THINK>No', '[THINK]yes[/THINK]No',
            '<|begin_of_thought|>yes<|end_of_thought|>\n<|begin_of_solution|>No<|end_of_solution|>', '◁think▷yes◁/think▷No',
            '<unused94>thought\nyes<unused95>No', '<think>yes <think> no</think> No', '<think>a<think>b</think>c</think>No',
            '<|channel|>analysis<|message|>yes<|end|><|start|>assistant<|channel|>final<|message|>No<|return|>', 'analysisIs it yes?assistantfinalNo',
            '<think>\\boxed{Yes}</think>No', '<reasoning>yes</reasoning><answer>No</answer>', '&lt;think&gt;yes&lt;/think&gt;No', '<|channel>thought\nyes<channel|>No']
CONTROL = ['No</s>', '<s> No</s>', 'No<|im_end|>', 'No<|eot_id|>', 'No<end_of_turn>\n', 'No<|endoftext|>', '[PAD][PAD]No', 'No<pad><pad>', 'No<eos>', 'No<｜end▁of▁sentence｜>',
           '<|im_start|>assistant\nNo<|im_end|>\n<|im_start|>user\nIs it yes?', '<start_of_turn>model\nNo<end_of_turn>', 'No<|end|>', '<|start_header_id|>assistant<|end_header_id|>\n\nNo<|eot_id|>']
MARKED = ['**No**', '`No`', '- no', '* No', '# No', '__No__', '*No*', '> No', '```\nNo\n```']
FRAMED = ['\\boxed{No}', '$\\boxed{\\text{No}}$', 'It is \\boxed{No}.', '<answer>No</answer>', 'I see. <answer> no', 'Final answer: No', '**Final Answer:** no', 'The lung is clear.\nFinal answer: No',
          'Answer: No', '### Response:\nNo', '\x08oxed{No}', '<|begin_of_box|>No<|end_of_box|>', '<CONCLUSION>No</CONCLUSION>']


@pytest.mark.parametrize('kind,texts', [('thoughts', THOUGHTS), ('control', CONTROL), ('markdown', MARKED), ('framed', FRAMED)])
def test_what_stands_around_an_answer_is_left_out_and_counted(kind, texts):
    for t in texts:
        n = Counter()
        assert strict_normalise(spoken(t, n)) == 'no' and n[kind] == 1, (t, spoken(t), n)
        assert spoken(spoken(t)) == spoken(t)
        assert strict(t, 'No') and not strict(t, 'Yes')


def test_thoughts_without_end_are_no_answer():
    for t in ('<think>It is no', '<think>no', '[THINK]no', '<|channel|>analysis<|message|>no'):
        n = Counter()
        assert spoken(t, n) == '' and n['unfinished'] == 1 and not strict(t, 'no')
    for t, kind in (('<think>no</think>', 'unfinished'), ('<think>no</think>\n</s>', 'unfinished'), ('</s>', 'empty'), ('<think></think>', 'empty')):
        n = Counter()
        answer_text(dict(text=t), n)
        assert n[kind] == 1 and n['thoughts'] == 0, (t, n)
    assert split_thoughts('No <think>or') == ('or', 'No ')


def test_two_boxes_and_two_labels_win_nothing():
    assert not strict('\\boxed{yes} \\boxed{no}', 'no') and not strict('<answer>yes</answer><answer>no</answer>', 'no')
    assert framed('Answer: yes\nAnswer: no') is None and framed('The answer is B.') is None and framed('A: CT') is None


@pytest.mark.parametrize('text', ['Yes', ' as it is ', '< 5 cm', 'p < 0.05 and > 3', 'a < b', 'snake_case_name', '5 * 10^6 * 2', 'ER+', '1. Yes', 'Yes, it costs 5 $ or 6 $',
                                  'analysis of the image', 'left\n\nright', 'x*y*z', "don't", 'T1 > T2', '“yes”', '-50 HU', 'A: CT', 'the final answer'])
def test_plain_texts_stay_to_the_letter(text):
    n = Counter()
    assert spoken(text, n) == text and not +n


OPPOSITES = [('ER+', 'ER-'), ('ER+', 'ER'), ('ER-', 'ER'), ('< 5 cm', '> 5 cm'), ('<5 cm', '5 cm'), ('-50 HU', '50 HU'), ('−50 HU', '50 HU'), ('–50 HU', '50 HU'), ('−50', '+50'),
             ('CD20 (+)', 'CD20 (-)'), ('CD20 (−)', 'CD20'), ('CD20 [+]', 'CD20 [-]'), ('10⁶', '106'), ('10^6', '106'), ('10⁻⁶', '10⁶'), ('10^-6', '10^6'), ('10**6', '106'),
             ('≤ 5', '< 5'), ('<= 5', '< 5'), ('≥5', '>5'), ('＜5', '5'), ('HER2 3+', 'HER2 3'), ('ER+/PR-', 'ER-/PR+'), ('ER-/PR-', 'ER+/PR-'), ('CD4+CD8-', 'CD4-CD8+'),
             ('T1 > T2', 'T1 < T2'), ('+', '-'), ('(+)', '(-)'), ('++', '+'), ('.5 cm', '5 cm'), ('p<.05', 'p>.05'), ('Na⁺', 'Na⁻'), ('+ve', '-ve'), ('5 ± 2', '5 2'), ('A+', 'A'),
             ('< five cm', 'five cm'), ('-20, -50', '20, 50'), ('from -20 to 50', 'from 20 to 50'), ('10<sup>6</sup>', '106'), ('$10^{-6}$', '10^6'), ('$\\geq 5$', '> 5'), ('&lt;5', '&gt;5'),
             ('ER +', 'ER -'), ('desmin+', 'desmin-'), ('t(9;22)', 't(9;21)'), ('1.12 x 10^-7', '1.12 x 10-7'), ('gram (+)', 'gram (-)')]
SAME = [('ER+', 'er +'), ('ER-', 'er-'), ('CD20 (+)', 'CD20+'), ('CD20 (-)', 'CD20−'), ('x-ray', 'x ray'), ('X- ray', 'x-ray'), ('x‑ray', 'X-Ray'), ('T2-weighted', 'T2 weighted'),
        ('T1- and T2-weighted', 'T1 and T2 weighted'), ('3-4 cm', '3 4 cm'), ('3–4 cm', '3 - 4 cm'), ('- yes', 'yes'), ('yes -', 'yes'), ('yes-', 'yes'), ('left-', 'left'), ('— left', 'left'),
        ('-50 HU', '−50 HU'), ('− 50 HU', '-50 HU'), ('10⁶', '10^6'), ('10⁶', '10**6'), ('10^{6}', '10⁶'), ('10^(-6)', '10⁻⁶'), ('10<sup>-6</sup>', '10⁻⁶'), ('<5', '< 5'), ('≤5', '<= 5'), ('≧ 5', '≥5'),
        ('+50', '50'), ('cm²', 'cm2'), ('cm^2', 'cm²'), ('.5 cm', '0.5 cm'), ('3+4', '3 + 4'), ('a -> b', 'a b'), ('> yes', 'yes'), ('mass + edema', 'mass edema'), ('well-differentiated', 'well differentiated'),
        ('18F-FDG', '¹⁸F FDG'), ('H₂O', 'H2O'), ('1,000', '1000'), ('1.5cm', '1.5 cm'), ('(left)', 'left'), ('non-small-cell', 'non small cell'), ('< five', '<5'), ('ＥＲ＋', 'ER+'), ('A/P', 'A P')]


@pytest.mark.parametrize('a,b', OPPOSITES)
def test_opposites_are_not_the_same(a, b):
    assert not strict(a, b) and not strict(b, a)
    assert SCORERS['strict'](dict(answer=b, answer_type='OPEN'), a)['open_exact'] == 0


@pytest.mark.parametrize('a,b', SAME)
def test_writing_is_still_writing(a, b): assert strict(a, b) and strict(b, a)


def test_a_sign_hides_no_yes_or_no():
    o = dict(answer='No', answer_type='CLOSED', question='?')
    assert [SCORERS['strict'](o, t)['closed'] for t in ('yes+no', 'yes/no', 'yes > no', 'no+', '+no', 'no')] == [0, 0, 0, 1, 1, 1]


def test_the_published_rules_read_the_text_as_written():
    items = [dict(id='q', images=['a.png'], question='Is it?', answer='No', answer_type='CLOSED')]
    rows, notes = score_answers(items, [dict(prompt='Is it?', text='<think>yes?</think> No')], n_draws=9)
    value = {r['metric']: r['value'] for r in rows if r['slice'] == 'all'}
    assert (value['strict'], value['strict.closed'], value['lmms_slake.accuracy'], value['medevalkit.closed']) == (1, 1, 0, 0)
    assert value['answers.thoughts'] == 1 and '1 answers with thoughts, left out (llavamed_v1 and medevalkit and lmms_slake read' in notes[0]


def test_our_own_log_goes_through_the_same_place():
    items = [dict(id='q', images=['a.png'], question='Is it?', answer='No', answer_type='CLOSED')]
    log = [dict(model='m', dataset='d', split='test', condition='image', item='q', prompt='Is it?', text='<think>yes?</think> No</s>', error=None)]
    tables, odd = log_credits(items, log)
    (d,), (n,) = tables.values(), odd.values()
    assert d['strict'].tolist() == [1] and (n['thoughts'], n['control']) == (1, 1)
    assert next(r['value'] for r in score_table(items, log, n_draws=9) if r['metric'] == 'strict') == 1


def test_html_and_odd_texts():
    assert plain('a < b and <5 mm') == 'a < b and <5 mm' and plain('10<sup>6</sup>') == '10^6'
    n = Counter()
    assert [answer_text(dict(text=t), n) for t in ('<b>no</b>', 2.0, None, ['x'], ' ')] == ['<b>no</b>', '2', '', '', ' ']
    assert +n == Counter(html=1, number=1, null=1, not_text=1, empty=1) and set(ODD_TEXT) >= {'thoughts', 'control'}


@pytest.mark.parametrize('said, key, same', [('T2*', 'T2', False), ('T2', 'T2*', False), ('T2 star', 'T2*', True), ('*T2*', 'T2', True), ('3x4 cm', '3×4 cm', True),
    ('3 x 4 cm', '3*4 cm', True), ('5 to 10 mm', '5-10 mm', True), ('5 to 10 mm', '510 mm', False), ('2.0', '2', True), ('2.0 cm', '2 cm', True), ('2.05', '2', False),
    ('20', '2.0', False), ('1.2.0', '1.2', False), ('10.0', '1', False)])
def test_stars_ranges_sizes_and_numbers_with_a_zero_behind(said, key, same):
    assert strict(said, key) is same


def test_an_answer_of_a_hundred_thousand_letters_is_normalised_in_no_time():
    import time
    start = time.monotonic()
    for text in ('é' * 100_000, 'x' * 100_000 + ' - no', '-1 ' + ' ' * 100_000 + 'a'): strict_normalise(text)
    assert time.monotonic() - start < 5
