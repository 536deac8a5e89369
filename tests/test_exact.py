"What the cells of 08 and 09 cannot say: coverage over many simulated studies, faults, byte-identity."
import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from llava_med.core.registry import UnknownName
from llava_med.data.leakage import audit_splits
from llava_med.data.vqa import item_cluster
from llava_med.evaluate.conditions import partners
from llava_med.evaluate.subjects import predict
from llava_med.models.llava import tiny_model
from llava_med.core.runs import read_jsonl, write_csv
from llava_med.evaluate.exact import (SCORE_COLUMNS, HEAD, SLICE_KEYS, ScoreError, cluster_codes, edge_limits, finding_table, marks,
    no_interval, perplexity_table, score_of, score_table, strict, summarise)
from llava_med.evaluate.protocol import run_set
from llava_med.evaluate.score_rows import credit_rows, log_credits
from llava_med.evaluate.statistics import compare, paired_tests, with_tests


def study(rng, n_images=60, n_questions=8, gain=0.):
    "Marks of two models that read the same images; an image is easy or hard for both."
    easy, parts = rng.choice([.9, .35], n_images), []
    image, question = (o.ravel() for o in np.indices((n_images, n_questions)))
    for model, p in (('base', easy), ('stage2', easy + gain)):
        mine = np.clip(p + rng.choice([-.15, .15], n_images), 0, 1)   # an image suits one model more than the other
        parts.append(pd.DataFrame(dict(
            model=model, dataset='d', split='test', condition='image', item=image*n_questions + question, image=image,
            num=(rng.random(len(image)) < mine[image]).astype(float), den=1., **dict.fromkeys(SLICE_KEYS, ''))))
    return pd.concat(parts)[HEAD + ['item', 'image', 'num', 'den'] + SLICE_KEYS]


def difference(d, **kw):
    return next(r for r in summarise(d, 'strict', 400, 0, [], **kw) if r['model'] == 'stage2-base')


def test_a_difference_without_cause_is_found_one_time_in_twenty():
    rng = np.random.default_rng(0)
    found = [difference(study(rng)) for _ in range(300)]
    covered = np.mean([r['low'] <= 0 <= r['high'] for r in found])
    assert .91 <= covered <= .985, covered


def test_forgetting_the_images_finds_too_much():
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(150):
        d = study(rng)
        r = difference(d.assign(image=d['item']))     # every answer its own image
        covered.append(r['low'] <= 0 <= r['high'])
    assert np.mean(covered) < .91, np.mean(covered)


def test_a_real_difference_is_found():
    rng = np.random.default_rng(1)
    assert np.mean([difference(study(rng, gain=.15))['low'] > 0 for _ in range(40)]) > .7


def test_an_accuracy_is_covered():
    rng, truth, covered = np.random.default_rng(2), .625, []
    for _ in range(200):
        d = study(rng)
        r = next(r for r in summarise(d[d.model == 'base'], 'strict', 400, 0, []))
        covered.append(r['low'] <= truth <= r['high'])
    assert .90 <= np.mean(covered) <= .985, np.mean(covered)


def small_world(tmp_path, n=6):
    rng = np.random.default_rng(0)
    items = []
    for i in range(n):
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(tmp_path/f'{i}.png')
        for j, q in enumerate(('is there a nodule?', 'is the image free of nodules?', 'which side?')):
            items.append(dict(id=f'{i}-{j}', images=[f'{i}.png'], question=q, answer=('yes', 'no', 'left')[j],
                              answer_type='OPEN', patient=f'p{i//2}', tags=dict(question_type='presence', modality='mri'),
                              twin_of={0: f'{i}-1', 1: f'{i}-0'}.get(j)))
    return items


def table_of(items, folder, out, batch_size):
    out.mkdir()
    model, processor = tiny_model()
    for c in ('image', 'blank', 'shuffled', 'noise'):
        predict(model, processor, items, folder, out/'predictions.jsonl', 'stage2', c, max_new_tokens=4, batch_size=batch_size)
    write_csv(out/'scores.csv', score_table(items, read_jsonl(out/'predictions.jsonl'), n_draws=200), SCORE_COLUMNS)
    return (out/'scores.csv').read_bytes()


def test_same_seed_same_bytes(tmp_path):
    items = small_world(tmp_path)
    tables = [table_of(items, tmp_path, tmp_path/f'r{i}', 4) for i in range(2)]
    assert tables[0] == tables[1]
    assert tables[0].splitlines()[0].decode() == ','.join(SCORE_COLUMNS)


def test_a_stopped_prediction_goes_on(tmp_path):
    items = small_world(tmp_path)
    model, processor = tiny_model()
    log = tmp_path/'log.jsonl'
    predict(model, processor, items, tmp_path, log, 'base', max_new_tokens=3)
    whole = [{k: v for k, v in r.items() if k != 'seconds'} for r in read_jsonl(log)]
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b''.join(lines[:7]) + lines[7][:25])      # killed while it wrote
    done = predict(model, processor, items, tmp_path, log, 'base', max_new_tokens=3)
    assert (done['asked'], done['before']) == (len(items)-7, 7)
    assert [{k: v for k, v in r.items() if k != 'seconds'} for r in read_jsonl(log)] == whole


def test_other_weights_are_asked_again(tmp_path):
    items = small_world(tmp_path)
    log = tmp_path/'log.jsonl'
    for seed in (0, 1):
        done = predict(*tiny_model(seed=seed), items, tmp_path, log, 'base', max_new_tokens=2)
        assert done['asked'] == len(items)


def test_a_broken_image_is_an_error_and_no_answer(tmp_path):
    items = small_world(tmp_path)
    (tmp_path/'2.png').write_bytes(b'no image')
    log = tmp_path/'log.jsonl'
    done = predict(*tiny_model(), items, tmp_path, log, 'base', max_new_tokens=2)
    bad = [r for r in read_jsonl(log) if r['error']]
    assert done['errors'] == 3 == len(bad) and {r['item'][0] for r in bad} == {'2'}
    assert all(r['text'] is None and '2.png' in r['error'] for r in bad)
    assert sum(r['text'] is not None for r in read_jsonl(log)) == len(items)-3
    with pytest.raises(ValueError, match='3 predictions are errors'): marks(items, read_jsonl(log))
    with pytest.raises(ValueError, match='line 1'):
        log.write_text('{"model": \n' + log.read_text())
        predict(*tiny_model(), items, tmp_path, log, 'base', max_new_tokens=2)


@pytest.mark.parametrize('n_patients', [2, 3, 17])
def test_partners_are_other_patients(n_patients):
    rng = np.random.default_rng(n_patients)
    items = [dict(id=str(i), images=[f'{i}.png'], patient=f'p{rng.integers(n_patients)}') for i in range(40)]
    items += [dict(id=f'x{i}', images=[f'x{i}.png'], patient='p0' if i % 2 else 'p1') for i in range(2)]
    patient = {o['images'][0]: o['patient'] for o in items}
    counts = pd.Series(patient).value_counts()
    if 2*counts.iloc[0] > len(patient):
        with pytest.raises(ValueError, match='One patient has'): partners(items)
        return
    for seed in range(5):
        swap = partners(items, seed)
        assert all(patient[a] != patient[b] for a, b in swap.items())
        assert sorted(swap) == sorted(swap.values())


GOLDEN = [('No', 'Yes, it is abnormal', 0), ('No', 'The lungs are normal', 0), ('No', 'unknown', 0), ('No', 'No.', 1),
          ('Yes', 'Yes and no', 0), ('No', 'Yes and no', 0), ('Yes', 'There is a fracture', 0), ('Yes', 'yes no', 0),
          ('Left', 'left lung', 0), ('Yes', '', 0), ('left lung', 'Left lung', 1), ('left lung', 'right lung', 0),
          ('1.5 cm', '1.5cm', 1), ('4', 'four', 1), ('x-ray', 'an X ray', 1), ('A', 'this is B', 0), ('A', 'a.', 1),
          ('cannot be determined from the image', 'Cannot be determined from the image.', 1)]


@pytest.mark.parametrize('gold,text,right', GOLDEN)
def test_strict_is_strict(gold, text, right): assert strict(text, gold) == bool(right)


def test_order_of_the_log_changes_nothing():
    rng = np.random.default_rng(3)
    items = [dict(id=f'{i}-{j}', images=[f'{i}'], question='q', answer='yes', answer_type='CLOSED', tags=dict(question_type='side'))
             for i in range(20) for j in range(3)]
    log = [dict(model=m, dataset='d', split='test', condition=c, item=o['id'], text=str(rng.choice(['yes', 'no'])), error=None)
           for m in ('base', 'stage2') for c in ('image', 'blank') for o in items]
    def rows(log): return sorted(json.dumps(r) for r in score_table(items, log, n_draws=100))
    assert rows(log) == rows([log[i] for i in rng.permutation(len(log))])


# Patients and other clusters

def clinic(n_patients=100, views=2, n_questions=2, names='patient', seed=0):
    "Items of patients with several images each, and answers that are right for all of a patient or for none: the variance is known."
    skill, items, log = np.random.default_rng(seed).permutation(np.arange(n_patients) % 2), [], []
    for p, v, q in np.ndindex(n_patients, views, n_questions):
        own = {names: f'p{p}'} if names in ('patient', 'cluster') else dict(tags={'patient': f'p{p}'}) if names else {}
        items.append(dict(dict(id=f'{p}-{v}-{q}', images=[f'{p}-{v}.png'], question='?', answer='yes', answer_type='CLOSED', tags={}), **own))
        log.append(dict(model='stage2', dataset='d', split='test', condition='image', item=items[-1]['id'], text='yes' if skill[p] else 'no', error=None))
    return items, log


def half_width(items, log): r = score_of(score_table(items, log, n_draws=4000), 'stage2'); return (r['high'] - r['low'])/2, r


@pytest.mark.parametrize('names', ['patient', 'cluster', 'tag'])
def test_two_images_of_one_patient_are_one_piece_of_evidence(names):
    known = 1.96*.5/100**.5   # a hundred patients, each all right or all wrong
    by_patient, r = half_width(*clinic(names=names))
    by_image, q = half_width(*clinic(names=''))
    assert abs(by_patient/known - 1) < .06 and abs(by_image/known - .5**.5) < .06
    assert (r['n_items'], r['n_images'], r['n_clusters']) == (400, 200, 100) and q['n_clusters'] == 200


def test_every_rule_and_every_test_draws_patients():
    items, log = clinic()
    base = [dict(p, model='base', text='no') for p in log]
    tables, _ = log_credits(items, log + base, ('strict',))
    row = next(r for r in credit_rows(('stage2', 'd', 'test', 'image'), [tables['stage2', 'd', 'test', 'image']], 4000) if r['metric'] == 'strict')
    assert abs((row['high'] - row['low'])/2 - half_width(items, log)[0]) < 1e-9 and row['n_clusters'] == 100
    t = paired_tests(tables, ['strict']).iloc[0]
    assert (t.n_images, t.n_clusters) == (200, 100) and abs((t.high - t.low)/2/(1.96*.05) - 1) < .06
    captions = [dict(p, item=f"caption:{o['images'][0]}", text='') for o, p in zip(items[::2], log[::2])]
    truth = {o['images'][0]: dict(findings=['nodule']) for o in items}
    rows = finding_table(truth, captions, tags={o['images'][0]: dict(patient=o['patient']) for o in items}, n_draws=50)
    assert {(r['n_images'], r['n_clusters']) for r in rows if r['metric'] == 'finding_recall' and r['slice'] == 'all'} == {(200, 100)}


def test_one_image_a_patient_is_drawn_as_images_are():
    items, log = clinic(40, views=1)
    rng = np.random.default_rng(1)
    name = {p: f'{rng.integers(10**9)}' for p in {o['patient'] for o in items}}   # in another order than the images
    renamed = [dict(o, patient=name[o['patient']]) for o in items]
    assert score_table(renamed, log, n_draws=300) == score_table([{k: v for k, v in o.items() if k != 'patient'} for o in items], log, n_draws=300)
    assert len(set(cluster_codes(marks(items, log)))) == 40
    with pytest.raises(ScoreError, match="The image '0-0.png' is of 'else' and 'p0'; give all questions"): score_table([dict(items[0], patient='else'), *items[1:]], log)


def test_swaps_splits_and_audit_know_clusters(tmp_path):
    items = clinic(5, 3, 1, 'cluster')[0]
    for name, other in partners(items).items(): assert name.split('-')[0] != other.split('-')[0]
    assert {item_cluster(o) for o in items} == {f'p{i}' for i in range(5)}
    with pytest.raises(ValueError, match='share 1 patients'): run_set(dict(train=items[:4], val=[], test=items[4:]), tmp_path)
    shared = {r['check']: r for r in audit_splits(items[:4], items[4:])}['patients']
    assert (shared['shared'], shared['of']) == (1, 4)


# Slices of one's own

def test_any_tag_is_a_slice():
    items, log = clinic(20)
    items = [dict(o, tags=dict(sex='FM'[i % 2], age_group=i % 3), scanner='A') for i, o in enumerate(items)]
    rows = score_table(items, log, n_draws=50, slices=['sex', 'age_group', 'scanner', 'answer_type'])
    wanted = [r['slice'] for r in rows if r['metric'] == 'strict']
    assert wanted == ['all', 'answer_type=closed', 'sex=f', 'sex=m', 'age_group=0', 'age_group=1', 'age_group=2', 'scanner=a']
    assert sum(r['n_items'] for r in rows if r['slice'].startswith('age_group=') and r['metric'] == 'strict') == len(items)
    with pytest.raises(UnknownName, match="slices: there is no tag named 'six'. Did you mean sex. Known: age_group, .*sex"): score_table(items, log, slices=['six'])
    with pytest.raises(ScoreError, match="the tag 'id_no' has 80 values"): score_table([dict(o, id_no=i) for i, o in enumerate(items)], log, slices=['id_no'])


def test_a_condition_of_a_recipe_has_its_difference():
    items, log = clinic(20)
    more = [dict(p, condition=c, text='no') for p in log for c in ('half', 'blank')]
    rows = score_table(items, log + more, n_draws=50)
    assert [c for c in dict.fromkeys(r['condition'] for r in rows)] == ['image', 'half', 'blank', 'image-blank', 'image-half']
    assert score_of(rows, 'stage2', 'image-half')['value'] == .5


# One interval, one p

@pytest.mark.parametrize('n_patients', [1, 4, 5, 6, 9, 13, 14, 40])
def test_a_difference_and_its_p_say_the_same(n_patients):
    rng = np.random.default_rng(n_patients)
    for gain in np.linspace(-.6, .6, 13):
        items, log = clinic(n_patients, 2, 2)
        texts = lambda p: ['yes' if rng.random() < p else 'no' for _ in log]
        said = [dict(p, model=m, text=t) for m, p0 in (('stage2', .5 + gain/2), ('base', .5 - gain/2)) for p, t in zip(log, texts(p0))]
        rows = score_table(items, said, n_draws=200)
        tests = paired_tests(log_credits(items, said, ('strict',))[0], ['strict'], n_draws=10_000)
        r, t = score_of(with_tests(rows, tests), 'stage2-base'), tests.iloc[0]
        if n_patients == 1: assert (t.p, r['low'], r['high']) == (1, '', ''); continue   # no interval of one
        assert (t.p < .05) == (t.low > 0 or t.high < 0) == (r['low'] > 0 or r['high'] < 0)
        assert r['low'] <= r['value'] <= r['high'] and (n_patients > 5 or (r['low'], r['high']) == (-1, 1))


def test_few_patients_are_compared_exactly():
    items, log = clinic(6, 2, 2)
    said = [dict(p, model=m, text=t) for m, t in (('stage2', 'yes'), ('base', 'no')) for p in log]
    t = compare({m: log_credits(items, [p for p in said if p['model'] == m], ('strict',))[0][m, 'd', 'test', 'image'] for m in ('stage2', 'base')},
                [('stage2', 'base')], ['strict']).iloc[0]
    assert t.p == 2/64 and (t.low, t.high) == (pytest.approx(2*.025**(1/6) - 1), 1) and t.n_clusters == 6   # one of 64 sets of signs is as far, on each side


def scored(rights, questions=1, metric='strict', model='stage2', **kw):
    "The row over all of a model that is right on some images: credits of 0 to 1, one an image."
    d = pd.DataFrame([dict(model=model, dataset='d', split='test', condition='image', item=f'{i}-{j}', image=str(i),
                           num=float(x), den=1., **dict.fromkeys(SLICE_KEYS, '')) for i, x in enumerate(rights) for j in range(questions)])
    return summarise(d, metric, 300, 0, [], **kw)[0]


@pytest.mark.parametrize('n', [2, 3, 10, 60])
def test_all_or_none_right_has_the_exact_limit(n):
    right, wrong = scored([1]*n, questions=4), scored([0]*n, questions=4)
    limit = round(.05**(1/n), 4)
    assert (right['value'], right['low'], right['high'], right['n_clusters']) == (1, limit, 1, n)   # images, not questions
    assert (wrong['value'], wrong['low'], wrong['high']) == (0, 0, round(1 - .05**(1/n), 4))
    assert np.diff(np.round(edge_limits(.5, n), 9))[0] == pytest.approx(1 - .05**(1/n))


def test_three_of_three_and_three_thousand_are_not_alike():
    assert scored([1]*3)['low'] == .3684 and scored([1]*3000)['low'] == .999


def test_half_a_credit_everywhere_is_no_certainty():
    row = scored([.5]*4)
    assert (row['low'], row['high']) == tuple(round(x, 4) for x in edge_limits(.5, 4)) and row['low'] < .25 < .75 < row['high']


def test_one_image_has_no_interval():
    row = scored([1], questions=9)
    assert (row['value'], row['low'], row['high'], row['n_items']) == (1, '', '', 9) and no_interval(row) == '– one image'


def test_what_has_no_bound_has_no_limit():
    row = scored([7.5]*6, bounds=None)
    assert (row['low'], row['high']) == ('', '') and no_interval(row) == '– all alike'
    same, one = perplexity_table(dict(base=[(4., 2)]*5)), perplexity_table(dict(base=[(4., 2)]))
    assert [r['low'] for r in same + one] == ['', '']
    assert perplexity_table(dict(base=[(4., 2), (3., 2), (5., 2)]))[0]['low'] != ''


@pytest.mark.parametrize('a,b,low,high', [
    ([1, 0, 1], [1, 0, 1], -(1 - .05**(1/3)), 1 - .05**(1/3)), ([1]*6, [0]*6, 2*.025**(1/6) - 1, 1),
    ([0]*4, [1]*4, -1, 1 - 2*.025**(1/4))])
def test_differences_without_spread_have_a_width(a, b, low, high):
    part = dict(dataset='d', split='test', condition='image', den=1., **dict.fromkeys(SLICE_KEYS, ''))
    d = pd.DataFrame([dict(part, model=m, item=str(i), image=str(i), num=float(x)) for m, xs in (('stage2', a), ('base', b)) for i, x in enumerate(xs)])
    row = next(r for r in summarise(d, 'strict', 300, 0, []) if r['model'] == 'stage2-base')
    assert (row['low'], row['high']) == (round(low, 4), round(high, 4))


def test_a_caption_that_says_nothing_is_no_image_for_precision():
    truth = {f'{i}.png': dict(findings=['nodule', 'mass']) for i in range(6)}
    said = [dict(model='m', dataset='d', split='test', condition='image', item=f'caption:{i}', error=None,
                 text='nodule' if k < 3 else '') for k, i in enumerate(truth)]
    rows = finding_table(truth, said, read=lambda t: dict(findings=t.split()), n_draws=50)
    row = next(r for r in rows if r['metric'] == 'finding_precision' and r['slice'] == 'all')
    assert (row['value'], row['low'], row['n_images']) == (1, round(.05**(1/3), 4), 6)


def test_no_row_of_any_rule_has_an_interval_without_width():
    items = [dict(id=f'{i}{j}', images=[f'{i}.png'], question=q, answer=a, answer_type=t, tags=dict(organ='lung' if i else 'heart'))
             for i in range(4) for j, (q, a, t) in enumerate([('is it?', 'yes', 'CLOSED'), ('where?', 'left lung', 'OPEN')])]
    for say in (lambda o: o['answer'], lambda o: 'nothing', lambda o: 'left'):
        log = [dict(model=m, dataset='d', split='test', condition='image', item=o['id'], prompt=o['question'], error=None, text=say(o))
               for m in ('stage2', 'base') for o in items]
        tables, odd = log_credits(items, log)
        rows = [r for d in tables for r in credit_rows(d, [tables[d]], 200)]
        heads = list(tables)
        rows += credit_rows(('stage2-base', 'd', 'test', 'image'), [tables[heads[0]], tables[heads[1]]], 200)
        assert rows and not [r for r in rows if r['low'] != '' and r['high'] - r['low'] < 1e-6]
        assert all((r['low'] == '') == (r['n_clusters'] == 1 or no_interval(r) == '– all alike') for r in rows)
        assert all(r['low'] == '' for r in rows if r['slice'] == 'organ=heart')
