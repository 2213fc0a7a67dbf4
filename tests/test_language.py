"""Text, windows, byte pairs, sampling and language models against definitions, PyTorch and plainer programs."""
import bz2, copy, hashlib, math, pickle, re
from collections import Counter
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from exp import nb_43
from exp.nb_00 import set_seed, test_near as near
from exp.nb_04 import DataLoader
from exp.nb_10 import Learner
from exp.nb_12 import AdamW
from exp.nb_13 import Checkpoint, load_weights, save_weights
from exp.nb_40 import Transformer
from exp.nb_43 import (BPE, GRU, PIECE, PLAYS, LanguageModel, as_tokens, bits_per_char, draw_token, generate, get_plays, get_text, get_text_dls, load_bpe, next_probs,
                       split_text, token_loss, train_bpe, windows, windows_in_order)

FAST = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 10**6)


def rng(seed): return torch.Generator().manual_seed(seed)
def recurrent(vocab=20, seed=0): return seeded(lambda: LanguageModel(vocab, 6, GRU(6, 10), 10), seed)
def attentive(vocab=20, length=16, seed=0): return seeded(lambda: LanguageModel(vocab, 8, Transformer(8, 2, 2, length=length, causal=True)), seed)

def seeded(make, seed):
    set_seed(seed)
    return make()


# The text

def test_ten_plays():
    plays = get_plays()
    assert len(plays) == 10 and all(play.startswith(title) and play.isascii() and '\f' not in play for title, play in plays.items())
    assert sum(map(len, plays.values())) == 1_139_972
    sums = (PLAYS.parent/'SHA256SUMS').read_text().split()
    assert sums == [hashlib.sha256(bz2.decompress(PLAYS.read_bytes())).hexdigest(), 'plays.txt']

def test_the_split_never_leaks():
    "Every play is its training part and its validation part; no line of validation longer than usual is in training."
    train, valid = get_text()
    parts = [split_text(play) for play in get_plays().values()]
    assert [a + b for a, b in parts] == [*get_plays().values()]
    assert train == ''.join(a for a, _ in parts) and valid == ''.join(b for _, b in parts)
    for a, b in parts: assert a.endswith('\n') and 0.09 < len(b)/len(a + b) < 0.11
    long_ones = {line for line in valid.split('\n') if len(line) > 45}
    assert len(long_ones & {*train.split('\n')}) <= 2  # Shakespeare repeats himself

@FAST
@given(st.text(alphabet='ab\n', min_size=1, max_size=60), st.floats(0.01, 0.99))
def test_split_text(text, share):
    try: a, b = split_text(text, share)
    except ValueError: assert '\n' not in text[:round(len(text)*(1 - share))] or not text[text.rfind('\n', 0, round(len(text)*(1 - share))) + 1:]
    else: assert a + b == text and a.endswith('\n') and b

@pytest.mark.parametrize('share', [0, 1, -0.1, 2])
def test_a_share_that_is_none(share):
    with pytest.raises(ValueError, match='expected a share in'): get_text(share)

def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    def refuse(self): raise PermissionError(13, 'Permission denied', str(self))
    monkeypatch.setattr(type(tmp_path), 'read_bytes', refuse)
    with pytest.raises(PermissionError, match='plays'): get_plays(tmp_path/'plays')

def test_a_damaged_file_is_named(tmp_path):
    data, path = PLAYS.read_bytes(), tmp_path/'plays.txt.bz2'
    changed = bytearray(data)
    changed[len(data)//2] ^= 1
    for wrong in (b'', data[:5000], bytes(changed), b'text', bz2.compress(b'To be, or not')):
        path.write_bytes(wrong)
        for read in (get_plays, lambda p: get_text(path=p)):
            with pytest.raises(ValueError, match=re.escape(str(path))): read(path)
    with pytest.raises(FileNotFoundError): get_plays(tmp_path/'none')
    with pytest.raises(OSError) as error: get_plays(tmp_path)  # a folder is no damaged file
    assert not isinstance(error.value, ValueError)
    path.write_bytes(data)
    assert get_plays(str(path)) == get_plays()


# Windows

@FAST
@given(st.integers(2, 60), st.integers(1, 20), st.data())
def test_each_token_is_a_target_once_with_all_the_context_there_is(n, length, data):
    overlap = data.draw(st.integers(0, length - 1))
    x, y = windows_in_order(range(n), length, overlap)[:]
    assert x.shape == y.shape and x.shape[1] == length
    assert y[y != -100].tolist() == [*range(1, n)]
    assert (y[y != -100] - x[y != -100]).eq(1).all()
    for row_x, row_y in zip(x[1:], y[1:]): assert row_y.ne(-100).nonzero()[0] == overlap  # that many tokens before the first that counts
    assert (y[1:] != -100).any(1).all()

@FAST
@given(st.integers(2, 60), st.integers(1, 20))
def test_windows(n, length):
    if n <= length:
        with pytest.raises(ValueError, match='expected more tokens'): windows(range(n), length)
        return
    ds = windows(torch.arange(n), length)
    x, y = ds[torch.arange(len(ds))]
    assert len(ds) == n - length and x[:, 0].tolist() == [*range(n - length)] and (y - x == 1).all() and x.shape[1] == length

def test_random_windows_have_a_seed_and_are_others_in_each_epoch():
    def epochs(seed):
        torch.rand(seed)  # the global generator doesn't matter
        dl = get_text_dls(range(500), range(50), 8, 4, seed)[0]
        return [[x.tolist() for (x, _), _ in zip(dl, range(5))] for _ in range(2)]
    a = epochs(3)
    assert a == epochs(3) != epochs(4) and a[0] != a[1]

@pytest.mark.parametrize('tokens', ['abc', [0.5], [[1, 2]], torch.rand(4), torch.zeros(2, 2, dtype=torch.long), [True, False], [1, None],
                                    torch.ones(2, dtype=torch.complex64)])
def test_what_is_no_list_of_tokens(tokens):
    with pytest.raises(ValueError, match='expected tokens'): as_tokens(tokens)

@pytest.mark.parametrize('tokens, vocab, message', [([3, -1], None, 'of at least 0, got -1'), (torch.tensor([-5]), None, 'of at least 0, got -5'), ([-1], 4, 'from 0 to 3, got -1'),
                                                    ([1, 4, 7], 4, 'from 0 to 3, got 4'), (torch.tensor([255], dtype=torch.uint8), 255, 'from 0 to 254, got 255')])
def test_tokens_outside_the_vocabulary_are_named_once_for_a_data_set(tokens, vocab, message):
    padded = [*torch.as_tensor(tokens).tolist(), 0, 0]
    for f in (lambda: as_tokens(tokens, vocab), lambda: windows(padded, 1, vocab), lambda: windows_in_order(padded, 2, 1, vocab),
              lambda: get_text_dls(padded, [0, 1], 1, vocab=vocab), lambda: get_text_dls([0, 1], padded, 1, vocab=vocab)):
        with pytest.raises(ValueError, match=f'expected tokens {message}$'): f()

def test_as_tokens():
    assert as_tokens([0, 3], 4).tolist() == [0, 3]
    assert as_tokens([]).dtype is torch.int64 and as_tokens(range(3)).tolist() == [0, 1, 2] == as_tokens(torch.arange(3, dtype=torch.uint8)).tolist()


# Bits

class Rule(nn.Module):
    "Scores from a table, by the last token."
    def __init__(self, table):
        super().__init__()
        self.register_buffer('table', torch.as_tensor(table).log())
    def forward(self, x): return self.table[x]

@FAST
@given(seeds, st.integers(2, 9), st.integers(2, 70), st.integers(1, 9), st.integers(1, 5))
def test_bits_of_a_known_source(seed, vocab, n, length, bs):
    "However it is cut into windows and batches: the mean over all tokens but the first."
    table = torch.rand(vocab, vocab, generator=rng(seed)) + 0.01
    table /= table.sum(1, keepdim=True)
    tokens = torch.randint(vocab, (n,), generator=rng(seed + 1))
    expected = -table[tokens[:-1], tokens[1:]].log2().mean().item()
    for overlap in (0, length//2):
        ds = windows_in_order(tokens, length, overlap)
        near(bits_per_char(Rule(table), DataLoader(ds, bs)), expected, rtol=1e-4)
        near(bits_per_char(Rule(table), ds, chars=2*(n - 1)), expected/2, rtol=1e-4)

def test_a_coin_and_a_cycle():
    tokens = torch.randint(2, (99,), generator=rng(0))
    near(bits_per_char(Rule(torch.full((2, 2), 0.5)), windows_in_order(tokens, 8)), 1.)
    cycle = Rule(torch.eye(3).roll(1, 1).clamp(min=1e-30))
    near(bits_per_char(cycle, windows_in_order([0, 1, 2]*9, 5)), 0., atol=1e-6)

@FAST
@given(seeds, st.integers(3, 60), st.integers(1, 5))
def test_the_learner_weighs_an_uneven_last_batch(seed, n, bs):
    tokens, model = torch.randint(20, (n,), generator=rng(seed)), recurrent(seed=seed)
    ds = windows_in_order(tokens, 8, 3)
    expected = F.cross_entropy(torch.cat([model(x[None])[0] for x in ds.x]), ds.y.flatten())
    found = Learner(model, (None, DataLoader(ds, bs)), token_loss, progress=False).validate()['valid_loss']
    near(found, expected, rtol=1e-4)


# The layers

@FAST
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5), st.integers(1, 12), st.booleans(), seeds)
def test_gru_is_pytorchs(dim, hidden, n, t, with_state, seed):
    set_seed(seed)
    ours, theirs = GRU(dim, hidden).double(), nn.GRU(dim, hidden, batch_first=True).double()
    params = theirs.weight_ih_l0, theirs.bias_ih_l0, theirs.weight_hh_l0, theirs.bias_hh_l0
    ours.load_state_dict(dict(zip(ours.state_dict(), params)))
    x, h = torch.randn(n, t, dim).double().requires_grad_(), torch.randn(n, hidden).double().requires_grad_()
    caches = ours.new_caches()
    if with_state: caches[0].state = h
    y, (z, last) = ours(x, caches), theirs(x, h[None] if with_state else None)
    near(y, z, 1e-9, 1e-9)
    near(caches[0].state, last[0], 1e-9, 1e-9)
    weights, inputs = torch.randn_like(y), [x, h] if with_state else [x]
    for a, b in zip(torch.autograd.grad(y, [*inputs, *ours.parameters()], weights), torch.autograd.grad(z, [*inputs, *params], weights), strict=True):
        near(a, b, 1e-8, 1e-9)

def test_first_parameters_are_spread_as_pytorchs():
    set_seed(0)
    for p in GRU(64, 100).parameters(): near(p.std(), 0.1/math.sqrt(3), rtol=0.1) if p.ndim > 1 else near(p.abs().max(), 0.1, rtol=0.1)

@FAST
@given(seeds, st.integers(1, 15), st.integers(1, 3))
def test_no_token_sees_what_comes_later_and_caches_change_nothing(seed, cut, n):
    tokens = torch.randint(20, (n, 16), generator=rng(seed))
    for make in (recurrent, attentive):
        model = make(seed=seed).double()
        with torch.no_grad():
            whole, caches = model(tokens), model.new_caches()
            near(model(tokens[:, :cut]), whole[:, :cut], 1e-9, 1e-9)
            parts = [model(tokens[:, :cut], caches)] + [model(tokens[:, i:i+1], caches) for i in range(cut, 16)]
        near(torch.cat(parts, 1), whole, 1e-9, 1e-9)

@pytest.mark.parametrize('make', [recurrent, attentive])
def test_a_token_outside_the_vocabulary(make):
    for token in (20, -1, 10**6):
        with pytest.raises(ValueError, match='expected tokens from 0 to 19, got'): make()(torch.tensor([[3, token]]))
    with pytest.raises(ValueError, match='vocab'): LanguageModel(0, 6, GRU(6, 6))

def test_a_batch_is_not_looked_at(monkeypatch):
    "On a GPU a value that Python looks at is waited for: in training there is none, and `generate` checks the prompt alone."
    checked = []
    def noting(*args):
        checked.append(args)
        return as_tokens(*args)
    monkeypatch.setattr(nb_43, 'as_tokens', noting)
    model = recurrent()
    model(torch.zeros(2, 5, dtype=torch.long))
    model.to('meta')(torch.zeros(2, 5, dtype=torch.long, device='meta'))  # there are no values to look at
    assert checked == []
    generate(recurrent(), [1, 2], 5)
    assert checked == [([1, 2], 20)]

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_a_gpu_is_not_waited_for():
    model, tokens = recurrent().cuda(), torch.zeros(2, 5, dtype=torch.long, device='cuda')
    model(tokens)
    torch.cuda.set_sync_debug_mode('error')
    try: model(tokens)
    finally: torch.cuda.set_sync_debug_mode('default')


# What comes next

@FAST
@given(seeds, st.integers(1, 30), st.floats(0.1, 10), st.data())
def test_next_probs_by_definition(seed, vocab, temperature, data):
    scores = 3*torch.randn(vocab, generator=rng(seed))
    top_k = data.draw(st.none() | st.integers(1, vocab))
    top_p = data.draw(st.none() | st.floats(0.05, 1))
    order = sorted(range(vocab), key=lambda i: -scores[i])[:top_k]
    weights = [math.exp(scores[i].item()/temperature) for i in order]
    kept, total = [], 0.
    for w in weights:
        if top_p is not None and total >= top_p*sum(weights)*(1 + 1e-12): break
        kept.append(w)
        total += w
    expected = torch.zeros(vocab).double()
    for i, w in zip(order, kept): expected[i] = w/total
    near(next_probs(scores, temperature, top_k, top_p), expected, 1e-6, 1e-9)

def test_greedy_is_the_limit():
    scores = torch.tensor([1., 3., 2.])
    assert next_probs(scores, 0).tolist() == [0, 1, 0]
    near(next_probs(scores, 1e-3), [0., 1., 0.])
    for tiny in (1e-12, 5e-324): assert next_probs(scores, tiny).tolist() == [0, 1, 0]
    near(next_probs(scores, top_k=1), [0., 1., 0.])
    near(next_probs(scores, top_p=1e-9), [0., 1., 0.])

@pytest.mark.parametrize('options, message', [
    (dict(temperature=-0.1), 'temperature'), (dict(temperature=math.nan), 'temperature'), (dict(temperature=math.inf), 'temperature'),
    (dict(top_k=0), 'top_k'), (dict(top_k=21), '20, the vocabulary, got 21'), (dict(top_k=2.5), 'top_k'),
    (dict(top_p=0), 'top_p'), (dict(top_p=1.01), 'top_p'), (dict(top_p=math.nan), 'top_p')])
def test_options_that_make_no_distribution(options, message):
    for f in (lambda: next_probs(torch.zeros(20), **options), lambda: generate(recurrent(), [1], 2, **options)):
        with pytest.raises(ValueError, match=message): f()

@pytest.mark.parametrize('bad', [math.nan, math.inf])
@pytest.mark.parametrize('temperature', [0, 1])
def test_scores_of_a_training_that_diverged(bad, temperature):
    with pytest.raises(ValueError, match='expected scores, got nan or infinity'): next_probs(torch.tensor([0., bad, 1.]), temperature)
    assert next_probs(torch.tensor([0., -math.inf]), temperature).tolist() == [1, 0]  # what is ruled out

@FAST
@given(seeds)
def test_draws_follow_the_probabilities(seed):
    probs = next_probs(torch.randn(6, generator=rng(seed)), top_k=4)
    generator = rng(seed + 1)
    found = torch.tensor([draw_token(probs, generator) for _ in range(3000)]).bincount(minlength=6)/3000
    assert (found[probs == 0] == 0).all()
    near(found, probs, rtol=0, atol=0.05)

def test_draws_are_the_inverse_of_the_running_sum():
    probs, u = torch.tensor([0.1, 0., 0.4, 0.5]).double(), torch.rand((), generator=rng(5), dtype=torch.float64).item()
    assert draw_token(probs, rng(5)) == next(i for i, s in enumerate(probs.cumsum(0).tolist()) if s > u)


# Writing

def plainly(model, prompt, n, seed, **options):
    "Without caches; a full window keeps its later half."
    tokens, generator, start, length = [*prompt], rng(seed), 0, model.body.length
    model.eval()
    for _ in range(n):
        if length and len(tokens) - start > length: start = len(tokens) - max(1, length//2)
        with torch.no_grad(): scores = model(torch.tensor([tokens[start:]]))[0, -1]
        tokens.append(draw_token(next_probs(scores, **options), generator))
    return tokens

@settings(deadline=None, max_examples=12)
@given(seeds, st.integers(1, 30), st.integers(0, 40), st.integers(1, 16))
def test_generate_without_caches_is_the_same(seed, prompt, n, length):
    tokens = torch.randint(20, (prompt,), generator=rng(seed)).tolist()
    for model in (recurrent(seed=seed).double(), attentive(length=length, seed=seed).double()):
        for options in ({}, dict(temperature=0), dict(top_k=5, top_p=0.9, temperature=0.7)):
            assert generate(model, tokens, n, seed=seed, **options) == plainly(model, tokens, n, seed, **options)

def test_same_seed_same_text_whatever_the_global_generator_does():
    model, texts = recurrent(), []
    for seed in (1, 1, 2):
        torch.manual_seed(len(texts))
        before = torch.get_rng_state()
        texts.append(generate(model.train(), [1, 2], 30, seed=seed))
        assert torch.get_rng_state().equal(before) and model.training
    assert texts[0] == texts[1] != texts[2]

def test_prompts():
    model = recurrent()
    assert generate(model, [3], 0) == [3] and generate(model, torch.tensor([3, 4]), 1)[:2] == [3, 4]
    with pytest.raises(ValueError, match='at least one token, got none'): generate(model, [], 3)
    for token in (20, -1):
        with pytest.raises(ValueError, match=f'from 0 to 19, got {token}'): generate(model, [3, token], 3)
    with pytest.raises(ValueError, match='n to be a whole number'): generate(model, [1], -1)

def test_a_saved_model_goes_on_and_writes_the_same(tmp_path):
    model, other = attentive(seed=0), attentive(seed=1)
    save_weights(model, tmp_path/'m.safetensors')
    load_weights(other, tmp_path/'m.safetensors')
    for copied in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))): assert generate(copied, [1], 30) == generate(model, [1], 30)

def test_training_goes_on_after_a_checkpoint(tmp_path):
    def learner():
        dls = get_text_dls(torch.arange(300) % 20, torch.arange(40) % 20, 8, 32, seed=0)
        return Learner(recurrent(), dls, token_loss, AdamW, 0.01, progress=False)
    whole, first, second = learner(), learner(), learner()
    whole.fit(2)
    first.fit(1, cbs=[Checkpoint(tmp_path/'c.pt')])
    second.fit(2, cbs=[Checkpoint(tmp_path/'c.pt', resume=True)])
    for a, b in zip(whole.model.parameters(), second.model.parameters()): assert a.equal(b)

def test_a_cycle_is_learned():
    dls = get_text_dls(torch.arange(2000) % 7, torch.arange(100) % 7, 16, 16, seed=0)
    for make in (recurrent, attentive):
        learn = Learner(make(7), dls, token_loss, AdamW, progress=False)
        learn.fit_one_cycle(1, 0.03, max_batches=120)
        assert bits_per_char(learn.model, dls[1]) < 0.3
        assert generate(learn.model, [0, 1, 2], 10, temperature=0) == [i % 7 for i in range(13)]


# Byte pairs

def naive(text, vocab):
    "(merges, tokens): all pairs counted anew for each token."
    data = text.encode() if isinstance(text, str) else text
    words, merges = [[*piece] for piece in PIECE.findall(data)], []
    for new in range(256, vocab):
        pairs = Counter(pair for word in words for pair in zip(word, word[1:]))
        if not pairs: break
        pair = min(pairs, key=lambda p: (-pairs[p], p))
        if pairs[pair] < 2: break
        merges.append(pair)
        for k, word in enumerate(words):
            out, i = [], 0
            while i < len(word):
                if tuple(word[i:i+2]) == pair: out.append(new); i += 2
                else: out.append(word[i]); i += 1
            words[k] = out
    return merges, [token for word in words for token in word]

repetitive = st.text(alphabet='aab \n.', max_size=80) | st.binary(max_size=80) | st.text(max_size=60)

@FAST
@given(repetitive, st.integers(256, 290))
def test_training_and_encoding_equal_the_naive_ones(text, vocab):
    merges, tokens = naive(text, vocab)
    bpe = train_bpe(text, vocab)
    assert [*bpe.merges] == merges and bpe.encode(text) == tokens and bpe.vocab == 256 + len(merges) <= vocab

TRAINED = train_bpe(get_text()[0][:50_000], 400)

@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=200) | st.text(max_size=100).map(str.encode))
def test_any_bytes_come_back(data):
    for bpe in (TRAINED, BPE()):
        tokens = bpe.encode(data)
        assert bpe.to_bytes(tokens) == data == bpe.to_bytes(torch.tensor(tokens, dtype=torch.long))
        assert b''.join(PIECE.findall(data)) == data
    assert BPE().encode(data) == [*data]

@FAST
@given(st.text(max_size=100))
def test_any_text_comes_back(text): assert TRAINED.decode(TRAINED.encode(text)) == text

def test_no_token_goes_across_words(): assert not any(re.search(rb'\S\s', part) for part in TRAINED.parts)

@FAST
@given(text=st.text(alphabet='thequickbrown ', max_size=60))
def test_saved_and_loaded(text, tmp_path_factory):
    path = tmp_path_factory.mktemp('bpe')/'pairs.json'
    TRAINED.save(path)
    back = load_bpe(path)
    assert back.parts == TRAINED.parts and back.encode(text) == TRAINED.encode(text)
    assert pickle.loads(pickle.dumps(TRAINED)).encode(text) == TRAINED.encode(text)

@pytest.mark.parametrize('content', ['', 'null', '[]', '{}', '{"merges": 3}', '{"merges": [[1]]}', '{"merges": [[1, 256]]}', '{"merges": [[1, 2], [1, 2]]}'])
def test_another_file_is_named(content, tmp_path):
    path = tmp_path/'pairs.json'
    path.write_text(content)
    with pytest.raises(ValueError, match='pairs.json: expected merges'): load_bpe(path)

def test_tokens_and_bytes_that_make_no_text():
    for token in (400, -1):
        with pytest.raises(ValueError, match=f'expected tokens from 0 to 399, got {token}'): TRAINED.decode([65, token])
    with pytest.raises(ValueError, match=r"expected UTF-8, got b'\\xc3' at byte 1"): TRAINED.decode([65, 0xc3])
    assert TRAINED.decode([65, 0xc3], 'replace') == 'A\ufffd' and TRAINED.decode([]) == ''
    with pytest.raises(ValueError, match='vocab'): train_bpe('text', 255)

def test_a_model_of_byte_pairs_counts_characters():
    text = 'the king and the queen and the king '*20
    bpe = train_bpe(text, 280)
    tokens = torch.tensor(bpe.encode(text))
    even = Rule(torch.full((bpe.vocab, bpe.vocab), 1/bpe.vocab))
    chars = len(text) - len(bpe.parts[tokens[0]])
    near(bits_per_char(even, windows_in_order(tokens, 16, 8), chars), math.log2(bpe.vocab)*(len(tokens) - 1)/chars, rtol=1e-4)
