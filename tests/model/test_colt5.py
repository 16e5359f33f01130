"""The whole model: what comes out, what padding and later tokens cannot change, and that everything learns."""

import pytest
import torch

ENCODERS = [{}, {"routing": "static"}, {"routing": "random"}, {"heavy_key_value_ratio": 8.0}, {"encoder": "dense"}]
ENCODERS += [{"light_positions": "relative"}, {"encoder": "light"}, {"router_scores": "straight_through"}]
ENCODERS += [{"router_noise": 0.5}]
NAMES = ["learned", "static", "random", "all keys", "dense", "relative bias", "light", "straight through"]
NAMES += ["noise"]
each_encoder = pytest.mark.parametrize("fields", ENCODERS, ids=NAMES)


@each_encoder
def test_losses_have_the_shape_of_the_targets_and_are_zero_where_masked(build, batch, fields):
    token_loss, z_loss, routing = build(initializer_range=0.02, **fields)(**batch)
    mask = batch["target_mask"]
    assert token_loss.shape == z_loss.shape == mask.shape and token_loss.dtype == z_loss.dtype == torch.float32
    assert (token_loss[mask] > 0).all() and token_loss[~mask].count_nonzero() == 0 == z_loss[~mask].count_nonzero()
    # with small initial weights, an untrained model gives every token about the same probability
    assert token_loss[mask].mean().item() == pytest.approx(torch.tensor(128.0).log().item(), abs=0.3)
    assert routing == ()


@each_encoder
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_parameter_has_a_finite_gradient(build, batch, fields, dtype):
    model = build(**fields).to(dtype)
    output = model(**batch)
    (output.token_loss.sum() + 1e-4 * output.z_loss.sum()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    unused = {"encoder.layers.0.attention.router.routing_tokens.weight"} if fields == ENCODERS[3] else set()
    zero = {name for name, parameter in model.named_parameters() if parameter.grad.count_nonzero() == 0}
    assert zero <= unused, "nothing reaches these parameters"


@each_encoder
def test_wholly_padded_batch_is_finite_and_has_zero_gradient(build, batch, fields):
    model = build(**fields)
    batch = batch | {name: torch.zeros_like(batch[name]) for name in ("input_mask", "target_mask")}
    output = model(**batch)
    (output.token_loss.sum() + output.z_loss.sum()).backward()
    assert output.token_loss.count_nonzero() == 0
    assert [n for n, p in model.named_parameters() if p.grad is None or p.grad.isnan().any()] == []
    assert all(parameter.grad.count_nonzero() == 0 for parameter in model.parameters())


@each_encoder
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_does_not_move_a_valid_position_by_one_bit(build, batch, fields, dtype):
    model = build(**fields).to(dtype)
    generator = torch.Generator().manual_seed(2)
    other = dict(batch)
    for ids, mask in (("input_ids", "input_mask"), ("decoder_input_ids", "target_mask"), ("target_ids", "target_mask")):
        noise = torch.randint(1, 128, batch[ids].shape, generator=generator)
        other[ids] = torch.where(batch[mask], batch[ids], noise)
        assert not torch.equal(other[ids], batch[ids])
    valid = batch["input_mask"]
    states, moved = (
        model.encode(b["input_ids"], input_mask=valid, sample_index=b["sample_index"])[0][valid] for b in (batch, other)
    )
    assert torch.equal(states, moved)
    first, second = model(**batch), model(**other)
    assert torch.equal(first.token_loss, second.token_loss) and torch.equal(first.z_loss, second.z_loss)


@each_encoder
def test_padding_has_no_gradient(build, batch, fields):
    model = build(**fields)
    embedded = []
    model.embedding.register_forward_hook(lambda module, args, out: out.retain_grad() or embedded.append(out))
    model(**batch).token_loss.sum().backward()
    encoder_grad, decoder_grad = (tensor.grad for tensor in embedded)
    assert encoder_grad[~batch["input_mask"]].count_nonzero() == 0
    assert decoder_grad[~batch["target_mask"]].count_nonzero() == 0
    assert encoder_grad[1][batch["input_mask"][1]].count_nonzero() > 0


@pytest.mark.parametrize("fields", [{}, {"encoder": "dense"}], ids=["conditional", "dense"])
def test_no_mask_means_all_valid(build, batch, fields):
    model = build(**fields)
    ones = {name: torch.ones_like(batch[name]) for name in ("input_mask", "target_mask")}
    none = dict.fromkeys(ones)
    torch.testing.assert_close(model(**(batch | ones)).token_loss, model(**(batch | none)).token_loss)


def test_decoder_is_causal_bit_for_bit(build, batch):
    model = build()
    batch["target_mask"] = torch.ones_like(batch["target_mask"])
    first = model(**batch)
    for position in range(1, 12):
        changed = batch["decoder_input_ids"].clone()
        changed[:, position:] = (changed[:, position:] + 17) % 128
        second = model(**(batch | {"decoder_input_ids": changed}))
        assert torch.equal(first.token_loss[:, :position], second.token_loss[:, :position])
        assert not torch.equal(first.token_loss[:, position], second.token_loss[:, position])


@each_encoder
def test_decoder_reads_the_encoder(build, batch, fields):
    model = build(**fields)
    changed = batch["input_ids"].clone()
    changed[0, 50] = (changed[0, 50] + 1) % 128
    first, second = model(**batch).token_loss, model(**(batch | {"input_ids": changed})).token_loss
    assert not torch.equal(first[0], second[0]) and torch.equal(first[1:], second[1:])


def test_random_routing_depends_on_the_samples_number_only(build, batch):
    model = build(routing="random")
    first = model(**batch)
    order = torch.tensor([2, 0, 3, 1])
    permuted = model(**{name: value[order] for name, value in batch.items()})
    torch.testing.assert_close(permuted.token_loss, first.token_loss[order])
    assert not torch.equal(model(**(batch | {"sample_index": batch["sample_index"] + 1})).token_loss, first.token_loss)
    assert not torch.equal(build(routing="random", seed=1)(**batch).token_loss, first.token_loss)


def test_random_routers_of_a_model_draw_different_numbers(build, batch):
    routing = build(routing="random")(**batch, collect_routing=True).routing
    picks = [layer.query.indices[0].tolist() for layer in routing] + [
        layer.feed_forward.indices[0].tolist() for layer in routing
    ]
    assert len({tuple(pick) for pick in picks}) == len(picks)
    keys = routing[0].key_value.indices[0].tolist()
    assert not set(picks[0]) <= set(keys)


@each_encoder
def test_learns_a_batch_by_heart(build, batch, fields):
    model = build(**fields)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        output = model(**batch)
        loss = (output.token_loss.sum() + 1e-4 * output.z_loss.sum()) / batch["target_mask"].sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_autocast(build, batch):
    model = build()
    exact = model(**batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**batch)
    assert output.token_loss.dtype == torch.float32
    torch.testing.assert_close(output.token_loss, exact.token_loss, rtol=0, atol=0.05)
    output.token_loss.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_input_length_must_fit_the_budgets(build, batch):
    with pytest.raises(ValueError, match="multiple of 8"):
        build()(**(batch | {"input_ids": batch["input_ids"][:, :60], "input_mask": batch["input_mask"][:, :60]}))


def test_random_routing_needs_the_samples_numbers(build, batch):
    with pytest.raises(ValueError, match="sample_index"):
        build(routing="random")(**(batch | {"sample_index": None}))


def test_initial_weights_and_scores(build, batch):
    model = build(d_model=256, num_encoder_layers=8, vocab_size=1024)
    given = build(d_model=256, num_encoder_layers=8, vocab_size=1024, initializer_range=0.02, embedding_init_std=0.3)
    for weights, embedding_std, std in ((model, 1.0, 1 / 16), (given, 0.3, 0.02)):
        feed_forward = weights.encoder.layers[0].feed_forward.heavy_ff
        assert weights.embedding.weight.std().item() == pytest.approx(embedding_std, rel=0.05)
        assert feed_forward.to_hidden.weight.std().item() == pytest.approx(std, rel=0.05)
        assert feed_forward.to_out.weight.std().item() == pytest.approx(std / 4, rel=0.05)
        assert weights.loss.weight.std().item() == pytest.approx(std, rel=0.05)
    scores = []
    for encoder_layer in model.encoder.layers:
        for module in (encoder_layer.attention, encoder_layer.feed_forward):
            module.router.routing_tokens.register_forward_hook(lambda m, args, out: scores.append(out.flatten()))
    model(**(batch | {"input_mask": None}))
    assert torch.cat(scores).std().item() == pytest.approx(1.0, rel=0.3)


@pytest.mark.parametrize("scores", ["soft", "straight_through"])
def test_straight_through_scores_are_one_and_pick_the_same_tokens(build, batch, scores):
    """What multiplies the keys/values of valid tokens, and the gradient of the vectors that chose them."""
    model, seen = build(router_scores=scores), []
    layer = model.encoder.layers[0].attention
    layer.heavy_attn.register_forward_pre_hook(
        lambda _, args, given: seen.append(given["normalized_scores_kv"]), with_kwargs=True
    )
    one = {name: values[:1] for name, values in batch.items()}
    output = model(**one, collect_routing=True)
    output.token_loss.sum().backward()
    assert bool((seen[0] == 1).all()) == (scores == "straight_through")
    assert ((seen[0] > 0) & (seen[0] <= 1)).all()
    assert layer.router.routing_tokens.weight.grad.count_nonzero() > 0
    first_layer = build()(**one, collect_routing=True).routing[0]
    for here, there in zip(output.routing[0], first_layer, strict=True):
        assert torch.equal(here.indices, there.indices)
