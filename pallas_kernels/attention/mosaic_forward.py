"""The forward pass of attention on Hopper: see `mosaic_gpu`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention.mosaic_parts import (
    GROUPS,
    LOG2E,
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


def forward(q: Array, k: Array, v: Array, segment_ids: Array | None, form: Form, tiles: Tiles) -> tuple[Array, Array]:
    """Results [B, T, N, H], and log2 of each query's sum, float32 [B, N, T filled up to tiles]."""
    (b, _, n, h), group = q.shape, q.shape[2] // k.shape[2]
    items = work_items(spans_of(seen_tiles(segment_ids, q.shape, form, tiles), axis=2))
    ids = padded_ids(segment_ids, tiles)
    shared = h > 128  # Then there is no room for results beside the queries.

    def kernel(items_ref: Any, q_ref: Any, k_ref: Any, v_ref: Any, *rest: Any, **scratch: Any) -> None:
        ids_ref, (out_ref, sums_ref) = rest[0] if ids is not None else None, rest[-2:]
        out_smem = scratch["q"] if shared else scratch["out"]
        own = Own(scratch["own"], (scratch["q"],))
        keys = Ring(scratch["keys"], (scratch["k"],) if ids is None else (scratch["k"], scratch["ids"]))
        values = Ring(scratch["values"], (scratch["v"],))
        warpgroup = lax.axis_index("group")
        turns = Turns(scratch["turns"], warpgroup)

        load, unload = loads_of_keys(own, keys, values, (q_ref,), (k_ref, v_ref, ids_ref), group, tiles.keys)

        def compute(work: Work) -> None:
            item, count = work.item, work.before
            first = (item.tile * GROUPS + warpgroup) * ROWS
            rows, queries = pl.ds(first, ROWS), own.buffers[0].at[warpgroup]
            documents = None if ids_ref is None else row_numbers(ids_ref.at[item.batch, rows])
            plgpu.barrier_wait(own.full.at[warpgroup])

            def softmax(scores: Array, step: Array, highest: Array, total: Array, whole: bool) -> tuple[Array, ...]:
                slot = keys.slot(count + step)
                if not shared:
                    pl.when(step == item.steps() - 1)(lambda: plgpu.barrier_arrive(own.free.at[warpgroup]))
                scores, factor = scores_of(scores, form)
                if not whole:
                    both = None if documents is None else (documents, scratch["ids"].at[slot])
                    key = item.at(step)[1] * tiles.keys
                    scores = jnp.where(seen_of(form, scores.shape, first, key, both, 0), scores, MASKED)
                keys.release(slot)
                risen = jnp.maximum(highest, jnp.max(scores, axis=1) * factor)
                shrink, weights = jnp.exp2(highest - risen), jnp.exp2(scores * factor - along_rows(risen, scores.shape))
                return weights, shrink, risen, total * shrink + jnp.sum(weights, axis=1)

            def begin(scores_acc: Any) -> Array:
                scores_acc[...] = constant(0.0, ROWS, tiles.keys)
                turns.take()
                multiply(scores_acc, queries, scratch["k"].at[keys.arrived(count)].T)
                turns.give()
                return finished(scores_acc)

            def add(step: Array, carry: tuple[Array, ...], whole: bool) -> tuple[Array, ...]:
                def both(scores_acc: Any, sums_acc: Any) -> tuple[Array, ...]:
                    sums, weights, highest, total = carry
                    scores_acc[...], sums_acc[...] = constant(0.0, ROWS, tiles.keys), sums
                    turns.take()
                    multiply(scores_acc, queries, scratch["k"].at[keys.arrived(count + step)].T)
                    slot = values.arrived(count + step - 1)
                    multiply(sums_acc, weights, scratch["v"].at[slot])
                    turns.give()
                    scores = finished(scores_acc, behind=1)
                    weights, shrink, highest, total = softmax(scores, step, highest, total, whole)
                    sums = finished(sums_acc)
                    values.release(slot)
                    # The weights before them are being read from their registers until here.
                    sums, weights = lax.optimization_barrier((sums, weights))
                    return sums * along_rows(shrink, sums.shape), weights.astype(q.dtype), highest, total

                return pl.run_scoped(both, accumulator(tiles.keys), accumulator(h))

            scores = pl.run_scoped(begin, accumulator(tiles.keys))
            start = jnp.int32(0), constant(MASKED, ROWS), constant(0.0, ROWS)
            weights, _, highest, total = softmax(scores, *start, False)
            carry = constant(0.0, ROWS, h), weights.astype(q.dtype), highest, total
            carry = lax.fori_loop(1, item.masked(), lambda step, carry: add(step, carry, False), carry)
            carry = lax.fori_loop(item.masked(), item.steps(), lambda step, carry: add(step, carry, True), carry)
            sums, weights, highest, total = carry
            slot = values.arrived(count + item.steps() - 1)
            sums = multiplied(sums, weights, scratch["v"].at[slot])
            values.release(slot)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            out_smem[warpgroup] = (sums * along_rows(1 / total, sums.shape)).astype(q.dtype)
            scratch["sums"][warpgroup] = highest + jnp.log(total) * LOG2E
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_smem.at[warpgroup], out_ref.at[item.batch, rows, work.head])
            plgpu.copy_smem_to_gmem(scratch["sums"].at[warpgroup], sums_ref.at[item.batch, work.head, rows])
            if shared:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(own.free.at[warpgroup])

        each_item(items_ref, n, 1, load, unload, compute, scratch["turns"])

    length = items.shape[0] // b * tiles.queries
    shapes = [jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((b, n, length), jnp.float32)]
    matrices = dict.fromkeys(("q",) if shared else ("q", "out"), (GROUPS, ROWS, h))
    matrices |= dict.fromkeys(("k", "v"), (tiles.stages, tiles.keys, h))
    others: dict[str, Any] = {"sums": plgpu.SMEM((GROUPS, ROWS), jnp.float32), "own": Own.scratch(1)}
    others |= {"keys": Ring.scratch(tiles.stages, 1 if ids is None else 2), "values": Ring.scratch(tiles.stages, 1)}
    others |= {} if ids is None else {"ids": plgpu.SMEM((tiles.stages, tiles.keys), jnp.int32)}
    return call("attention_mosaic", kernel, shapes, matrices, others, n, items, q, k, v, ids)
