"Tokenizers from sentencepiece's own file, held against sentencepiece itself."
import functools
import io
import json
import random
import subprocess
import sys

import pytest
import sentencepiece
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from llava_med.models.llava import join, load, save
from llava_med.core.pieces import PROBES, from_sentencepiece, plain_tokenizer, read_pieces, read_tokenizer
from test_llava import tower

logging.set_verbosity_error()
TEXTS = ['where is it?', '  two  spaces ', ' led', '\nWhere is the lung?', 'a\n\nb\tc', '12 345.7', 'ﬁbröse 左肺 😀', 'kalemi  nodire', '']


def text(seed=0):
    rng = random.Random(seed)
    syllables = [a + b for a in 'dfklmnrt' for b in 'aeiou']
    words = [''.join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(200)]
    return [' '.join(rng.choices(words, k=9)) + ' 17' for _ in range(500)]


def pieces(kind='bpe', **kw): return made(kind, json.dumps(kw))


@functools.lru_cache
def made(kind, kw):
    "The bytes of a small model of sentencepiece, of the kind that Llama has."
    out = io.BytesIO()
    how = dict(vocab_size=360, byte_fallback=True, normalization_rule_name='identity', remove_extra_whitespaces=False, split_digits=True, minloglevel=2)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(text()), model_writer=out, model_type=kind, **(how | json.loads(kw)))
    return out.getvalue()


def folder(path, raw=None, words=None, special=None, added=None):
    "A folder as the originals have it."
    path.mkdir(parents=True, exist_ok=True)
    (path/'tokenizer.model').write_bytes(raw or pieces())
    for name, x in (('tokenizer_config.json', words), ('special_tokens_map.json', special), ('added_tokens.json', added)):
        if x is not None: (path/name).write_text(json.dumps(x))
    return path


def theirs(path, dummy=True):
    "Sentencepiece itself, with or without a space in front."
    proto = read_pieces(path/'tokenizer.model')
    proto.normalizer_spec.add_dummy_prefix = dummy
    return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())


VICUNA = dict(bos_token='<s>', eos_token='</s>', unk_token='<unk>', pad_token='<unk>')


@pytest.mark.parametrize('kind', ['bpe', 'unigram'])
@pytest.mark.parametrize('extra', [{}, dict(user_defined_symbols=['<X>', '[Y]']), dict(add_dummy_prefix=False), dict(normalization_rule_name='nmt_nfkc'),
                                   dict(byte_fallback=False, vocab_size=110), dict(split_digits=False, allow_whitespace_only_pieces=True)])
def test_ids_are_those_of_sentencepiece(kind, extra, tmp_path):
    f = folder(tmp_path/'t', pieces(kind, **extra), VICUNA)
    tok, sp = read_tokenizer(f, lambda s: None), sentencepiece.SentencePieceProcessor(model_file=str(f/'tokenizer.model'))
    ask = lambda s: tok(s).input_ids
    for s in [*TEXTS, *(p for p in PROBES if '<s>' not in p), 'see <X> and [Y]there<X>']: assert ask(s) == [1, *sp.encode(s)] if s else [1], s
    if extra.get('byte_fallback', True):
        for s in TEXTS: assert tok.decode(sp.encode(s)) == sp.decode(sp.encode(s)) or extra, s


@pytest.mark.parametrize('legacy, first', [(None, True), (True, True), (False, False)])
def test_the_space_behind_a_special_token(legacy, first, tmp_path):
    f = folder(tmp_path/'t', words=VICUNA | ({} if legacy is None else dict(legacy=legacy)))
    tok, new, later = from_sentencepiece(f), theirs(f), theirs(f, first)
    assert tok('led</s>kal 1</s>\nWhere').input_ids == [1, *new.encode('led'), 2, *later.encode('kal 1'), 2, *later.encode('\nWhere')]
    assert tok('<s>led', add_special_tokens=False).input_ids == [1, *later.encode('led')]
    assert tok(' led').input_ids == [1, *new.encode(' led')], 'a space that is written stands beside the one in front'


def test_added_tokens_as_in_llava(tmp_path):
    n = len(read_pieces(folder(tmp_path/'t')/'tokenizer.model').pieces)
    f = folder(tmp_path/'t', words=VICUNA, special=dict(bos_token={'content': '<s>', 'normalized': True, '__type': 'AddedToken'}, eos_token='</s>', unk_token='<unk>', pad_token='[PAD]'),
               added={'<im_end>': n + 3, '[PAD]': n, '<im_patch>': n + 1, '<im_start>': n + 2})
    tok, sp = from_sentencepiece(f), theirs(f)
    assert tok.convert_tokens_to_ids(['[PAD]', '<im_patch>', '<im_start>', '<im_end>', '<s>', '</s>']) == [n, n + 1, n + 2, n + 3, 1, 2]
    assert (tok.bos_token_id, tok.eos_token_id, tok.pad_token_id, len(tok)) == (1, 2, n, n + 4)
    assert tok('led <im_start><im_patch><im_end>\nWhere?').input_ids == [1, *sp.encode('led '), n + 2, n + 1, n + 3, *sp.encode('\nWhere?')]
    (f/'added_tokens.json').write_text(json.dumps({'[PAD]': n + 1}))
    with pytest.raises(ValueError, match=rf"'\[PAD\]' is said to be token {n + 1}, and would become {n}"): from_sentencepiece(f)
    (f/'added_tokens.json').unlink()
    (f/'tokenizer_config.json').write_text(json.dumps(VICUNA | dict(added_tokens_decoder={str(n): dict(content='<image>', special=True, lstrip=False, rstrip=True)})))
    tok = from_sentencepiece(f)
    assert tok('led<image>\nx').input_ids == [1, *sp.encode('led'), n, *sp.encode('x')], 'a token that takes the white space behind it'


def test_begin_and_end_as_the_files_say(tmp_path):
    f = folder(tmp_path/'t', words=dict(bos_token='', eos_token='', unk_token='', add_eos_token=True))
    tok = from_sentencepiece(f)
    assert (tok.bos_token, tok.eos_token) == ('<s>', '</s>') and tok('led').input_ids[0] == 1 and tok('led').input_ids[-1] == 2
    (f/'tokenizer_config.json').write_text(json.dumps(dict(add_bos_token=False)))
    assert from_sentencepiece(f)('led').input_ids == theirs(f).encode('led')
    (f/'tokenizer_config.json').write_text(json.dumps(dict(chat_template=[{'name': 'default', 'template': 'x'}, {'name': 'rag', 'template': 'y'}], model_max_length=77)))
    assert from_sentencepiece(f).chat_template == {'default': 'x', 'rag': 'y'} and from_sentencepiece(f).model_max_length == 77


def test_a_name_that_is_written_over_a_spare_piece(tmp_path):
    f = folder(tmp_path/'t', pieces(control_symbols=['[control_1]']), VICUNA | dict(added_tokens_decoder={'3': dict(content='<|im_end|>', special=True)}))
    tok = from_sentencepiece(f)
    assert tok.convert_tokens_to_ids('<|im_end|>') == 3 and tok('led<|im_end|>').input_ids == [1, *theirs(f).encode('led'), 3]


def test_what_is_saved_needs_no_sentencepiece(tmp_path):
    tok = from_sentencepiece(folder(tmp_path/'t', words=VICUNA | dict(legacy=False)))
    tok.save_pretrained(tmp_path/'plain')
    assert sorted(p.name for p in (tmp_path/'plain').iterdir()) == ['tokenizer.json', 'tokenizer_config.json']
    code = ("import sys; sys.modules['sentencepiece'] = None\nfrom transformers import AutoTokenizer\n"
            f"t = AutoTokenizer.from_pretrained({str(tmp_path/'plain')!r})\nprint([t(x).input_ids for x in {[*TEXTS, 'a</s>b']!r}])")
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert json.loads(out.stdout.splitlines()[-1]) == [tok(x).input_ids for x in [*TEXTS, 'a</s>b']], out.stderr[-500:]


@pytest.mark.parametrize('raw, words', [
    (b'version https://git-lfs.github.com/spec/v1\noid sha256:12', 'Git LFS pointer'), (b'IQ== 0\nIg== 1\n', 'tiktoken file'),
    (b'', 'is no sentencepiece model'), (b'<!doctype html>', 'is no sentencepiece model'), (None, 'is no sentencepiece model')])
def test_a_damaged_file_is_one_sentence(raw, words, tmp_path):
    f = folder(tmp_path/'t', raw or b'x')
    (f/'tokenizer.model').write_bytes(pieces()[:3000] if raw is None else raw)
    with pytest.raises(ValueError, match=words) as e: read_tokenizer(f)
    assert 'tiktoken`' not in str(e.value) and str(f/'tokenizer.model') in str(e.value) and '\n' not in str(e.value)


@pytest.mark.parametrize('kw, words', [(dict(model_type='word', vocab_size=100, byte_fallback=False), 'words or characters'), (dict(treat_whitespace_as_suffix=True), 'cannot be read exactly')])
def test_a_model_that_cannot_be_read_exactly_is_refused(kw, words, tmp_path):
    kind = kw.pop('model_type', 'bpe')
    f = folder(tmp_path/'t', pieces(kind, **kw))
    with pytest.raises(ValueError, match=words): from_sentencepiece(f)


def test_the_check_can_fail(tmp_path, monkeypatch):
    from llava_med.core import pieces as module
    right = module.merges_of
    monkeypatch.setattr(module, 'merges_of', lambda p: right(p)[::-1])
    with pytest.raises(ValueError, match='cannot be read exactly'): from_sentencepiece(folder(tmp_path/'t'))


def language(path, words=VICUNA):
    "A language model whose tokenizer is sentencepiece's file alone."
    f = folder(path, words=words)
    n = len(read_pieces(f/'tokenizer.model').pieces)
    LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=n)).save_pretrained(f)
    return f


@pytest.mark.parametrize('legacy', [True, False])
def test_a_joined_model_reads_and_keeps_them(legacy, tmp_path):
    f, said = language(tmp_path/'lm', VICUNA | dict(legacy=legacy)), []
    model, processor = join(tower(tmp_path/'t'), f, template='llava_v1', say=said.append)
    assert any('tokenizer.model' in s for s in said)
    save(model, processor, tmp_path/'m')
    assert not (tmp_path/'m/tokenizer.model').exists()
    again = load(tmp_path/'m')[1].tokenizer
    new, later, image = theirs(f), theirs(f, legacy), again.convert_tokens_to_ids('<image>')
    for tok in (processor.tokenizer, again):
        assert tok('led <image>\nWhere</s>kal').input_ids == [1, *new.encode('led '), image, *later.encode('\nWhere'), 2, *later.encode('kal')]
    (tmp_path/'m/tokenizer.json').unlink(); (tmp_path/'m/tokenizer.model').write_bytes((f/'tokenizer.model').read_bytes())
    (tmp_path/'m/added_tokens.json').write_text(json.dumps({'<image>': image}))
    (tmp_path/'m/tokenizer_config.json').write_text(json.dumps(VICUNA | dict(legacy=legacy)))
    model, processor = load(tmp_path/'m')
    assert processor.tokenizer('led <image>\nWhere</s>kal').input_ids == again('led <image>\nWhere</s>kal').input_ids
    (tmp_path/'m/tokenizer.model').write_bytes(b'broken')
    with pytest.raises(ValueError, match='no sentencepiece model'): load(tmp_path/'m')


def test_a_tokenizer_json_decides_over_its_class(tmp_path):
    f = language(tmp_path/'lm')
    tok = plain_tokenizer(read_pieces(f/'tokenizer.model'))
    tok.add_special_tokens(['<unk>', '<s>', '</s>'])
    tok.save(str(f/'tokenizer.json'))
    (f/'tokenizer_config.json').write_text(json.dumps(VICUNA | dict(tokenizer_class='LlamaTokenizer', legacy=False)))
    want = tok.encode('led</s>kal').ids
    assert AutoTokenizer.from_pretrained(f)('led</s>kal', add_special_tokens=False).input_ids != want, 'transformers reads the file as is now; this rule may go'
    said = []
    assert read_tokenizer(f, said.append)('led</s>kal', add_special_tokens=False).input_ids == want and 'as its tokenizer.json says' in said[0]
