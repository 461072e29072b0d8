"""The backward pass of attention on Hopper, a kernel for queries and one for keys and values: see `mosaic_gpu`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention.mosaic_parts import (
    GROUPS,
    MASKED,
    ROWS,
    Own,
    Ring,
    Turns,
    Work,
    accumulator,
    along_rows,
    call,
    constant,
    each_item,
    finished,
    from_memory,
    loads_of_keys,
    multiplied,
    multiply,
    padded_ids,
    row_numbers,
    scores_of,
    seen_of,
    work_items,
)
from pallas_kernels.attention.tiles import Tiles, seen_tiles, spans_of
from pallas_kernels.attention.xla import Form


def d_queries(
    q: Array,
    k: Array,
    v: Array,
    d_out: Array,
    log_sums: Array,
    along: Array,
    segment_ids: Array | None,
    form: Form,
    tiles: Tiles,
) -> Array:
    """Gradient of q. log_sums, along: [B, N, T filled up to tiles]."""
    (*_, n, h), group = q.shape, q.shape[2] // k.shape[2]
    items = work_items(spans_of(seen_tiles(segment_ids, q.shape, form, tiles), axis=2))
    ids = padded_ids(segment_ids, tiles)

    def kernel(items_ref: Any, q_ref: Any, k_ref: Any, v_ref: Any, do_ref: Any, *rest: Any, **scratch: Any) -> None:
        sums_ref, along_ref, ids_ref, dq_ref = rest[0], rest[1], rest[2] if ids is not None else None, rest[-1]
        own = Own(scratch["own"], (scratch["q"], scratch["do"]))
        keys = Ring(scratch["keys"], (scratch["k"],) if ids is None else (scratch["k"], scratch["ids"]))
        values = Ring(scratch["values"], (scratch["v"],))
        warpgroup = lax.axis_index("group")
        turns = Turns(scratch["turns"], warpgroup)

        load, unload = loads_of_keys(own, keys, values, (q_ref, do_ref), (k_ref, v_ref, ids_ref), group, tiles.keys)

        def compute(work: Work) -> None:
            item, count = work.item, work.before
            first = (item.tile * GROUPS + warpgroup) * ROWS
            rows, (queries, d_rows) = pl.ds(first, ROWS), (x.at[warpgroup] for x in own.buffers)
            documents = None if ids_ref is None else row_numbers(ids_ref.at[item.batch, rows])
            row_sums, row_along = (row_numbers(ref.at[item.batch, work.head, rows]) for ref in (sums_ref, along_ref))
            plgpu.barrier_wait(own.full.at[warpgroup])

            def multiply_both(scores_acc: Any, d_weights_acc: Any, step: Array) -> None:
                multiply(scores_acc, queries, scratch["k"].at[keys.arrived(count + step)].T)
                multiply(d_weights_acc, d_rows, scratch["v"].at[values.arrived(count + step)].T)

            def d_scores_of(scores: Array, d_weights_acc: Any, step: Array, whole: bool) -> Array:
                slot = keys.slot(count + step)
                scores, factor = scores_of(scores, form)
                if not whole:
                    both = None if documents is None else (documents, scratch["ids"].at[slot])
                    key = item.at(step)[1] * tiles.keys
                    scores = jnp.where(seen_of(form, scores.shape, first, key, both, 0), scores, MASKED)
                weights = jnp.exp2(scores * factor - along_rows(row_sums, scores.shape))
                weights = lax.optimization_barrier(sloped(weights, scores, form, whole))
                d_weights = finished(d_weights_acc)
                values.release(slot)
                pl.when(step == item.steps() - 1)(lambda: plgpu.barrier_arrive(own.free.at[warpgroup]))
                return weights * (d_weights - along_rows(row_along, scores.shape))

            def begin(scores_acc: Any, d_weights_acc: Any) -> Array:
                scores_acc[...], d_weights_acc[...] = (constant(0.0, ROWS, tiles.keys) for _ in range(2))
                turns.take()
                multiply_both(scores_acc, d_weights_acc, jnp.int32(0))
                turns.give()
                return d_scores_of(finished(scores_acc, behind=1), d_weights_acc, jnp.int32(0), False)

            def add(step: Array, carry: tuple[Array, Array], whole: bool) -> tuple[Array, Array]:
                def both(scores_acc: Any, d_weights_acc: Any, dq_acc: Any) -> tuple[Array, Array]:
                    scores_acc[...], d_weights_acc[...] = (constant(0.0, ROWS, tiles.keys) for _ in range(2))
                    dq_acc[...] = carry[0]
                    turns.take()
                    before = keys.slot(count + step - 1)
                    multiply(dq_acc, carry[1], scratch["k"].at[before])
                    multiply_both(scores_acc, d_weights_acc, step)
                    turns.give()
                    scores = finished(scores_acc, behind=1)
                    keys.release(before)
                    ds = d_scores_of(scores, d_weights_acc, step, whole)
                    dq, ds = lax.optimization_barrier((finished(dq_acc), ds))
                    return dq, ds.astype(q.dtype)

                return pl.run_scoped(both, accumulator(tiles.keys), accumulator(tiles.keys), accumulator(h))

            ds = pl.run_scoped(begin, accumulator(tiles.keys), accumulator(tiles.keys))
            carry = constant(0.0, ROWS, h), ds.astype(q.dtype)
            carry = lax.fori_loop(1, item.masked(), lambda step, carry: add(step, carry, False), carry)
            carry = lax.fori_loop(item.masked(), item.steps(), lambda step, carry: add(step, carry, True), carry)
            slot = keys.slot(count + item.steps() - 1)
            dq = multiplied(carry[0], carry[1], scratch["k"].at[slot])
            keys.release(slot)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            scratch["dq"][warpgroup] = (dq * form.scale).astype(q.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(scratch["dq"].at[warpgroup], dq_ref.at[item.batch, rows, work.head])

        each_item(items_ref, n, 1, load, unload, compute, scratch["turns"])

    matrices = dict.fromkeys(("q", "do", "dq"), (GROUPS, ROWS, h))
    matrices |= dict.fromkeys(("k", "v"), (tiles.stages, tiles.keys, h))
    others: dict[str, Any] = {"own": Own.scratch(2), "keys": Ring.scratch(tiles.stages, 1 if ids is None else 2)}
    others |= {"values": Ring.scratch(tiles.stages, 1)}
    others |= {} if ids is None else {"ids": plgpu.SMEM((tiles.stages, tiles.keys), jnp.int32)}
    shapes = [jax.ShapeDtypeStruct(q.shape, q.dtype)]
    operands = items, q, k, v, d_out, log_sums, along, ids
    return call("attention_mosaic_d_queries", kernel, shapes, matrices, others, n, *operands)[0]


def d_keys(
    q: Array,
    k: Array,
    v: Array,
    d_out: Array,
    log_sums: Array,
    along: Array,
    segment_ids: Array | None,
    form: Form,
    tiles: Tiles,
) -> tuple[Array, Array]:
    """Gradients of k and v, summed over the heads that they serve. log_sums, along: as of `d_queries`."""
    (*_, kv_heads, h), group = k.shape, q.shape[2] // k.shape[2]
    items = work_items(spans_of(seen_tiles(segment_ids, q.shape, form, tiles), axis=1))
    ids = padded_ids(segment_ids, tiles)
    shape = ROWS, tiles.queries

    def kernel(items_ref: Any, q_ref: Any, k_ref: Any, v_ref: Any, do_ref: Any, *rest: Any, **scratch: Any) -> None:
        sums_ref, along_ref, ids_ref = rest[0], rest[1], rest[2] if ids is not None else None
        own = Own(scratch["own"], (scratch["k"], scratch["v"]))
        more = () if ids is None else (scratch["ids"],)
        queries = Ring(scratch["queries"], (scratch["q"], scratch["sums"], *more))
        d_rows = Ring(scratch["d_rows"], (scratch["do"], scratch["along"]))
        warpgroup = lax.axis_index("group")
        turns = Turns(scratch["turns"], warpgroup)

        def load(work: Work) -> None:
            own.fetch(work, work.head, k_ref, v_ref)
            batch = work.item.batch

            def load_tile(step: Array) -> None:
                visit, tile = work.item.at(step)
                rows, head = pl.ds(tile * tiles.queries, tiles.queries), work.head * group + visit
                documents = () if ids_ref is None else (ids_ref.at[batch, rows],)
                queries.fetch(
                    work.before + step, q_ref.at[batch, rows, head], sums_ref.at[batch, head, rows], *documents
                )
                d_rows.fetch(work.before + step, do_ref.at[batch, rows, head], along_ref.at[batch, head, rows])

            pl.loop(0, work.item.steps())(load_tile)

        def unload(count: Array) -> None:
            own.await_all()
            queries.await_all(count)
            d_rows.await_all(count)

        def compute(work: Work) -> None:
            item, count = work.item, work.before
            first = (item.tile * GROUPS + warpgroup) * ROWS
            rows, (keys, values) = pl.ds(first, ROWS), (x.at[warpgroup] for x in own.buffers)
            documents = None if ids_ref is None else row_numbers(ids_ref.at[item.batch, rows])
            plgpu.barrier_wait(own.full.at[warpgroup])

            def multiply_both(scores_acc: Any, d_weights_acc: Any, step: Array) -> None:
                multiply(scores_acc, keys, scratch["q"].at[queries.arrived(count + step)].T)
                multiply(d_weights_acc, values, scratch["do"].at[d_rows.arrived(count + step)].T)

            def columns(name: str, slot: Array) -> Array:
                numbers = from_memory(scratch[name].at[slot], layout=plgpu.Layout.WGMMA.reduce(0))
                return lax.broadcast_in_dim(numbers, shape, [1])

            def add(step: Array, carry: tuple[Array, Array], whole: bool) -> tuple[Array, Array]:
                def all_four(scores_acc: Any, d_weights_acc: Any, dk_acc: Any, dv_acc: Any) -> tuple[Array, Array]:
                    scores_acc[...], d_weights_acc[...] = constant(0.0, *shape), constant(0.0, *shape)
                    dk_acc[...], dv_acc[...] = carry
                    turns.take()
                    multiply_both(scores_acc, d_weights_acc, step)
                    turns.give()
                    slot = queries.slot(count + step)
                    scores, factor = scores_of(finished(scores_acc, behind=1), form)
                    if not whole:
                        both = None if documents is None else (documents, scratch["ids"].at[slot])
                        query = item.at(step)[1] * tiles.queries
                        scores = jnp.where(seen_of(form, shape, query, first, both, 1), scores, MASKED)
                    weights = jnp.exp2(scores * factor - columns("sums", slot))
                    slopes, weights = lax.optimization_barrier((sloped(weights, scores, form, whole), weights))
                    multiply(dv_acc, weights.astype(q.dtype), scratch["do"].at[slot])
                    d_weights = finished(d_weights_acc, behind=1)
                    ds = slopes * (d_weights - columns("along", slot))
                    multiply(dk_acc, ds.astype(q.dtype), scratch["q"].at[slot])
                    dv = finished(dv_acc, behind=1)
                    d_rows.release(slot)
                    pl.when(step == item.steps() - 1)(lambda: plgpu.barrier_arrive(own.free.at[warpgroup]))
                    dk = finished(dk_acc)
                    queries.release(slot)
                    return lax.optimization_barrier((dk, dv))

                tile = accumulator(tiles.queries)
                return pl.run_scoped(all_four, tile, tile, accumulator(h), accumulator(h))

            carry = constant(0.0, ROWS, h), constant(0.0, ROWS, h)
            carry = lax.fori_loop(0, item.masked(), lambda step, carry: add(step, carry, False), carry)
            carry = lax.fori_loop(item.masked(), item.steps(), lambda step, carry: add(step, carry, True), carry)
            dk = carry[0]
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            scratch["dk"][warpgroup] = (dk * form.scale).astype(q.dtype)
            scratch["dv"][warpgroup] = carry[1].astype(q.dtype)
            plgpu.commit_smem()
            for name, ref in zip(("dk", "dv"), rest[-2:], strict=True):
                plgpu.copy_smem_to_gmem(scratch[name].at[warpgroup], ref.at[item.batch, rows, work.head])

        each_item(items_ref, kv_heads, group, load, unload, compute, scratch["turns"])

    matrices = dict.fromkeys(("k", "v", "dk", "dv"), (GROUPS, ROWS, h))
    matrices |= dict.fromkeys(("q", "do"), (tiles.stages, tiles.queries, h))
    others: dict[str, Any] = {"own": Own.scratch(2), "queries": Ring.scratch(tiles.stages, 2 if ids is None else 3)}
    others |= {"d_rows": Ring.scratch(tiles.stages, 2)}
    others |= {name: plgpu.SMEM((tiles.stages, tiles.queries), jnp.float32) for name in ("sums", "along")}
    others |= {} if ids is None else {"ids": plgpu.SMEM((tiles.stages, tiles.queries), jnp.int32)}
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)]
    operands = items, q, k, v, d_out, log_sums, along, ids
    # The GPU deals these items, which are few and long, to its multiprocessors better than turns do.
    return tuple(call("attention_mosaic_d_keys", kernel, shapes, matrices, others, kv_heads, *operands, stay=False))


def sloped(weights: Array, scores: Array, form: Form, whole: bool) -> Array:
    """Weights times the slope of what caps their scores. whole: no score is masked.

    Behind a barrier before products are waited for, or scores would be held in registers until these have come.
    """
    if form.cap is None:
        return weights
    # Where a score is masked its weight is zero, and any finite slope will do.
    capped = scores if whole else jnp.maximum(scores, -1.0)
    return weights * (1 - capped * capped)
