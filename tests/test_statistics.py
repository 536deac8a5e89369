"The machinery of comparisons on many simulated studies and on real answers: how often it finds what is not there, and what is."
from itertools import product

import numpy as np
import pytest
from scipy.stats import false_discovery_control, norm

from llava_med.core.runs import test_data as data_folder
from llava_med.evaluate.answer_files import read_answers
from llava_med.evaluate.answer_text import answer_text
from llava_med.evaluate.pairing import align
from llava_med.evaluate.score_rows import credits
from llava_med.evaluate.exact import ScoreError
from llava_med.evaluate.statistics import (_p, calibration_error, compare, design_effect, holm, mcnemar, null_rate, paired_difference,
                                  share_interval, minimum_detectable_effect, subset_means)
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
    draws = subset_means(num, np.full(num.shape, float(n_questions)), 1000)
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
    gain = minimum_detectable_effect(n)
    d = rng.choice([1., 0, -1], (n, studies), p=[.075 + gain/2, .85, .075 - gain/2])
    draws = subset_means(d, np.ones(d.shape), 1000)
    assert .75 <= (_p(draws) < .05).mean() <= .87


def test_published_sizes_and_intervals():
    assert [round(100*minimum_detectable_effect(n), 1) for n in (272, 416, 451, 1061, 6761)] == [6.6, 5.3, 5.1, 3.3, 1.3]
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
        assert r['p'] == pytest.approx(2*norm.sf(z), abs=.09)   # the test counts ties on both sides


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
    (lambda: mcnemar([.5], [1]), '0 or 1'), (lambda: minimum_detectable_effect(0), 'at least one'),
    (lambda: calibration_error([.5], [1, 0]), '1 confidences for 2 answers'), (lambda: calibration_error([np.nan], [1]), 'between 0 and 1'),
    (lambda: compare({}, [('a', 'b')]), "No answers of 'a'")])
def test_bad_input_is_named(work, message):
    with pytest.raises(ScoreError, match=message): work()


def sign_flips(d):
    "Two-sided p of the exact sign-flip test, by going through all signs."
    sums = [sum(x*s for x, s in zip(d, signs)) for signs in product((1, -1), repeat=len(d))]
    above = np.mean([s >= sum(d) - 1e-9 for s in sums])
    below = np.mean([s <= sum(d) + 1e-9 for s in sums])
    return min(1., 2*min(above, below))


@pytest.mark.parametrize('n', [2, 3, 5, 6, 9, 12])
def test_p_on_few_images_is_that_of_all_signs(n):
    rng = np.random.default_rng(n)
    for _ in range(12):
        d = rng.choice([-1., 0, .5, 1], n, p=[.15, .25, .2, .4])
        if np.ptp(d) == 0: continue
        got = paired_difference(d, 0*d, np.arange(n))
        assert got['p'] == pytest.approx(sign_flips(d)) and got['p'] >= 2/2**n - 1e-12
        assert (got['p'] < .05) == (got['low'] > 0 or got['high'] < 0)


def test_questions_about_one_image_flip_together():
    d = np.array([1., 1, 1, 0, 1, -1, 1, 0, 1, 1, 1, 1])
    got = paired_difference(d, 0*d, np.repeat(np.arange(6), 2))
    assert got['p'] == pytest.approx(sign_flips(d.reshape(6, 2).sum(1)))


@pytest.mark.parametrize('n,wins', [(400, 4), (100, 5), (60, 6), (17, 3)])
def test_few_wins_among_many_images_are_judged_as_by_mcnemar(n, wins):
    a = np.r_[np.ones(wins), np.zeros(n - wins)]
    got = paired_difference(a, 0*a, np.arange(n))
    assert got['p'] == pytest.approx(mcnemar(a, 0*a), abs=.012) and got['p'] > 0
    assert (got['p'] < .05) == (got['low'] > 0)


@pytest.mark.parametrize('n', [2, 3, 5, 6, 10, 30])
@pytest.mark.parametrize('c', [0, 1, -1, .2])
def test_alike_differences_have_a_width_and_a_p_that_agrees(n, c):
    d = np.full(n, float(c))
    r = paired_difference(d, 0*d, np.arange(n))
    assert -1 <= r['low'] < r['high'] <= 1 and r['low'] <= c <= r['high']
    assert (r['p'] < .05) == (r['low'] > 0 or r['high'] < 0)
    if c == 0: assert (r['p'], r['high']) == (1, pytest.approx(1 - .05**(1/n)))
    if abs(c) == 1: assert r['p'] == pytest.approx(2/2**n)


def test_one_image_has_no_interval_and_shows_nothing():
    r = paired_difference([1, 1, 0], [0, 0, 0], ['a', 'a', 'a'])
    assert np.isnan(r['low']) and np.isnan(r['high']) and r['p'] == 1


def test_unbounded_alike_differences_have_no_interval():
    r = paired_difference([9., 9, 9, 9, 9, 9], [2.]*6, range(6))
    assert np.isnan(r['low']) and r['p'] == pytest.approx(2/2**6)


@pytest.mark.parametrize('n_images', [3, 4, 6, 8, 12, 20])
def test_small_sets_without_cause_are_seldom_called_different(n_images):
    rng, found = np.random.default_rng(n_images), []
    for _ in range(400):
        d = rng.choice([-1., 0, 1], (n_images, 3), p=[.3, .4, .3]).ravel()
        r = paired_difference(d, 0*d, np.repeat(np.arange(n_images), 3), 1000)
        found.append(r['p'] < .05)
    assert np.mean(found) <= .075, np.mean(found)   # 5 % and two standard errors
