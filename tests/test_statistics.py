"The machinery of comparisons on many simulated studies and on real answers: how often it finds what is not there, and what is."
import numpy as np
import pytest
from scipy.stats import false_discovery_control, norm

from llava_med.core.runs import test_data as data_folder
from llava_med.evaluate.scorers import align, answer_text, credits, read_answers
from llava_med.evaluate.exact import ScoreError, bootstrap
from llava_med.evaluate.statistics import (_p, calibration_error, compare, design_effect, holm, mcnemar, null_rate, paired_difference,
                                  share_interval, smallest_difference)
from llava_med.data.vqa_readers import read_vqa

DATA = data_folder()
real = pytest.mark.skipif(DATA is None or not (DATA/'llava_med').is_dir(), reason='no LLAVA_MED_TESTDATA')


def null_sums(rng, n_images, n_questions, n, spread=.15):
    "Sums of differences by image of n studies of two equally good models, each with fresh images and answers."
    easy = rng.choice([.85, .35], (n_images, n))
    def right(): return rng.binomial(n_questions, np.clip(easy + rng.choice([-spread, spread], (n_images, n)), 0, 1))
    return (right() - right()).astype(float)


@pytest.mark.parametrize('n_images,n_questions', [(203, 2), (96, 11), (60, 8)])
def test_fresh_null_comparisons_are_called_different_one_time_in_twenty(n_images, n_questions):
    num = null_sums(np.random.default_rng(0), n_images, n_questions, 1500)
    _, draws = bootstrap(num, np.full(num.shape, float(n_questions)), 1000)
    rate = (_p(draws) < .05).mean()
    assert .03 <= rate <= .07, rate


@pytest.fixture(scope='module')
def answers():
    items = read_vqa(DATA/'vqa_rad/testset.json')
    def table(name):
        found = align(items, read_answers(DATA/f'llava_med/v1_vqarad_answer-file{name}.jsonl'))[0]
        return credits(items, {k: answer_text(r, {'html': 0, 'empty': 0}) for k, r in found.items()}, ('llavamed_v1', 'strict'))
    return dict(trained=table(''), zeroshot=table('-llava-zeroshot'), epoch1=table('-1epoch'))


@real
@pytest.mark.parametrize('metric', ['strict.closed', 'llavamed_v1.closed_substring', 'llavamed_v1.open_recall'])
def test_null_comparisons_of_real_answers(answers, metric):
    a, b = (answers[m][metric].to_numpy() for m in ('trained', 'zeroshot'))
    known = np.isfinite(a)
    got = null_rate(a[known], b[known], answers['trained'].image[known], n=2000)
    assert .03 <= got['rate'] <= .07 and got['low'] < got['rate'] < got['high'], got


@real
def test_comparison_of_real_answers(answers):
    d = compare(answers, [('trained', 'zeroshot'), ('trained', 'epoch1')], n_draws=2000)
    r = d[(d.metric == 'llavamed_v1.closed_substring') & (d.model == 'trained-zeroshot')].iloc[0]
    assert round(100*r.difference, 2) == round(100*(132 - 82)/272, 2) and (r.n_items, r.n_images) == (272, 146)
    assert r.win - r.loss == 50 and r.win + r.tie + r.loss == 272 and r.low > 0 and r.p < .01 and r.p_mcnemar < .001
    assert (d.p_holm >= d.p).all() and d.p_holm.max() <= 1
    assert d[d.metric == 'llavamed_v1.open_recall'].p_mcnemar.isna().all()


def test_what_should_be_found_four_times_in_five_is():
    rng, n, studies = np.random.default_rng(1), 272, 800
    gain = smallest_difference(n)
    d = rng.choice([1., 0, -1], (n, studies), p=[.075 + gain/2, .85, .075 - gain/2])
    _, draws = bootstrap(d, np.ones(d.shape), 1000)
    assert .75 <= (_p(draws) < .05).mean() <= .87


def test_published_sizes_and_intervals():
    assert [round(100*smallest_difference(n), 1) for n in (272, 416, 451, 1061, 6761)] == [6.6, 5.3, 5.1, 3.3, 1.3]
    assert [round(100*x, 1) for x in share_interval(229, 272)] == [79.4, 88.0]
    assert [round(100*x, 1) for x in share_interval(110, 179)] == [54.2, 68.3]


def test_the_p_value_agrees_with_the_interval():
    rng = np.random.default_rng(2)
    for _ in range(40):
        images = rng.integers(0, 50, 300)
        a, b = (rng.random((2, 300)) < [[.6], [.5]])*1.
        r = paired_difference(a, b, images, 2000)
        assert (r['p'] < .049) <= (not r['low'] <= 0 <= r['high']) and (r['p'] > .052) <= (r['low'] <= 0 <= r['high'])
        z = abs(r['difference'])/r['se']
        assert r['p'] == pytest.approx(2*norm.sf(z), abs=.05)


def test_the_design_effect_agrees_with_the_bootstrap():
    rng = np.random.default_rng(3)
    images = np.repeat(np.arange(150), 6)
    suits = rng.choice([-.35, .35], 150)[images]
    a, b = (rng.random((2, 900)) < np.stack([.5 + suits, .5 - suits]))*1.
    by_image, by_item = (paired_difference(a, b, i, 4000)['se'] for i in (images, np.arange(900)))
    assert design_effect(a, b, images) == pytest.approx((by_image/by_item)**2, rel=.08)


def test_holm_lies_between_none_and_bonferroni():
    ps = np.random.default_rng(4).random(30)**3
    got = holm(ps)
    assert (got >= ps).all() and (got <= np.minimum(1, 30*ps)).all()
    assert (np.argsort(got[np.argsort(ps)], kind='stable') == np.arange(30)).all()
    assert (got >= false_discovery_control(ps) - 1e-12).all()


def test_calibration_error_of_perfect_models_is_what_chance_says():
    rng = np.random.default_rng(5)
    found = []
    for _ in range(60):
        p = rng.uniform(.5, 1, 272)
        found.append(calibration_error(p, rng.random(272) < p, n_draws=60))
    assert np.mean([f['ece'] for f in found]) == pytest.approx(np.mean([f['chance'] for f in found]), abs=.004)
    assert np.mean([f['ece'] > f['chance_high'] for f in found]) < .15


@pytest.mark.parametrize('work,message', [
    (lambda: paired_difference([], [], []), '0 differences'), (lambda: paired_difference([1, np.nan], [0, 0], [1, 2]), '1 of them numbers'),
    (lambda: mcnemar([.5], [1]), '0 or 1'), (lambda: smallest_difference(0), 'at least one'),
    (lambda: calibration_error([.5], [1, 0]), '1 confidences for 2 answers'), (lambda: calibration_error([np.nan], [1]), 'between 0 and 1'),
    (lambda: compare({}, [('a', 'b')]), "No answers of 'a'")])
def test_bad_input_is_named(work, message):
    with pytest.raises(ScoreError, match=message): work()
