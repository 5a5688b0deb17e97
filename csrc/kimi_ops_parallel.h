/* SPDX-License-Identifier: MIT
 *
 * The part of the public C API for experts spread over GPUs: for those who want it beside
 * kimi_ops.h, which says the conventions.
 */
#ifndef KIMI_OPS_PARALLEL_H_
#define KIMI_OPS_PARALLEL_H_

#include "kimi_ops.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ---- all_to_all: tokens to the ranks of their experts and back, over memory that peers reach --- */

/* What a rank knows of the others. Kernels see nothing else of them: how the memory came to be
 * reachable (one allocation, CUDA IPC, symmetric memory) is the caller's business. */
typedef struct kimi_peer_memory {
  void* const* buffers; /* [P] on the device: where each rank's buffer lies for this one */
  void* state;          /* this rank's kimi_all_to_all_state, on its device */
  int64_t buffer_bytes; /* of each, 128-byte aligned: kimi_all_to_all_buffer_bytes() */
  int64_t timeout_ns;   /* for a rank that does not come; 1 or more */
  int32_t halves;       /* 2 for each operation that may be under way at once */
  int32_t rank;
  int32_t world; /* P, 1..KIMI_ALL_TO_ALL_MAX_RANKS */
} kimi_peer_memory;
#define KIMI_ALL_TO_ALL_MAX_RANKS 64
#define KIMI_ALL_TO_ALL_MAX_LOCAL 8 /* ranks of one launch */
#define KIMI_ALL_TO_ALL_MAX_TOP_K 32

/* Buffers and states are zero before the first call of any rank. The state may be read at any time;
 * after `silent`, `strange` or `overfull` calls give no rows and wait for nobody, until all ranks have
 * zeroed everything. */
typedef struct kimi_all_to_all_state {
  uint64_t epoch;    /* operations so far */
  uint64_t masked;   /* bit r: rank r is left out; the caller sets it, alike on all ranks */
  uint64_t silent;   /* bit r: rank r did not come in time */
  uint64_t strange;  /* bit r: rank r came with another operation or other shapes */
  uint64_t overfull; /* bit r: rank r would have had more rows than it has room for (strict) */
  uint32_t arrivals; /* blocks of the present kernel */
  uint32_t most;     /* rows that a rank of `overfull` would have had */
} kimi_all_to_all_state;

/* Stages of an operation, in order. All together are one cooperative launch, for few tokens; else
 * three: SEND and RECEIVE use the whole grid and wait for nobody, MEET is one block. */
typedef KIMI_ENUM(kimi_all_to_all_phase){KIMI_ALL_TO_ALL_SEND = 1, KIMI_ALL_TO_ALL_MEET = 2,
                                         KIMI_ALL_TO_ALL_RECEIVE = 4,
                                         KIMI_ALL_TO_ALL_ALL = 7} kimi_all_to_all_phase;

/* Rows by (local expert, source rank, token, slot); csrc/all_to_all/all_to_all.h says how. S is the
 * most tokens of a rank, El the experts of this one; token t of rank s is token s * S + t. With
 * `again` the layout is that of an earlier dispatch: what is marked (layout) is read, not written,
 * and indices, row_map, offsets, tokens_per_expert, loads are not used. */
typedef struct kimi_all_to_all_dispatch_params {
  kimi_peer_memory peers;
  const void* x;          /* [T, row_bytes], rows x_stride_bytes apart */
  const void* beside;     /* [T, beside_bytes] dense (scales), or NULL */
  const int32_t* indices; /* [T, K]; any id that is none is dropped */
  const int32_t* row_map; /* [T, K], offsets [E], tokens_per_expert [E] of */
  const int32_t* offsets; /* kimi_permute_plan(indices, E, align 1) */
  const int32_t* tokens_per_expert;
  const float* weights;         /* [T, K] to travel along where y_weights is given */
  void* y;                      /* out [R, row_bytes] dense; padding is zero */
  void* y_beside;               /* out [R, beside_bytes] or NULL */
  float* y_weights;             /* out [P * S, K], 0 for what is elsewhere; or NULL */
  int32_t* y_row_map;           /* (layout) out [P * S, K]: the row, -1 elsewhere or dropped */
  int32_t* y_source;            /* (layout) out [R]: token * K + slot, -1 padding */
  uint32_t* y_slots;            /* (layout) out [P * S]: where this rank's sums lie at home */
  uint32_t* home;               /* (layout) out [T]: where those of this rank's tokens lie */
  int32_t* y_offsets;           /* (layout) out [El] inclusive ends */
  int32_t* y_tokens_per_expert; /* (layout) out [El] without padding */
  int32_t* loads;               /* out [P, E]: pairs of each rank for each expert */
  int64_t* report;              /* out [4 + P]: epoch, rows that this rank would have, the most
                                       that any would, pairs dropped here; (layout) tokens of each */
  int64_t num_tokens;           /* T <= S */
  int64_t max_tokens; /* S, the same on all ranks, as are K and the bytes; P S K <= 2^30 */
  int64_t num_rows;   /* R; what passes it is dropped, of every expert the last rows
                                       beyond a level that is the highest to fit */
  int64_t row_bytes;  /* 1..2^30 */
  int64_t x_stride_bytes;
  int64_t beside_bytes; /* 0..2^30, a multiple of 4 */
  int32_t num_experts;  /* E, P..1024 */
  int32_t top_k;        /* K */
  int32_t align;        /* rows of an expert are padded to a multiple */
  int32_t direct;       /* 1: results come home one by one, 0: summed by rank */
  int32_t again;
  int32_t strict;     /* 1: where any rank would have more than R rows all have failed (state) */
  int32_t num_blocks; /* 0: as many as are resident */
  int32_t num_local;  /* of one launch: params[0 .. num_local - 1]; 0 is 1 */
  kimi_all_to_all_phase phases;
} kimi_all_to_all_dispatch_params;

KIMI_API kimi_status kimi_all_to_all_dispatch(const kimi_all_to_all_dispatch_params* params,
                                              kimi_device device, void* stream);

/* y[t] = sum_k weights[t, k] out[row of (t, k)] in the tree that csrc/all_to_all/all_to_all.h says;
 * the names of dispatch. */
typedef struct kimi_all_to_all_combine_params {
  kimi_peer_memory peers;
  const void* out;        /* [R, H] dtype, rows out_stride elements apart */
  const int32_t* row_map; /* y_row_map [P * S, K] */
  const uint32_t* slots;  /* y_slots [P * S] */
  const uint32_t* home;   /* [T] */
  const int64_t* report;  /* [4 + P] */
  const float* weights;   /* y_weights [P * S, K]; direct: [T, K] of this rank; NULL: 1 */
  void* y;                /* out [T, H] dense, dtype */
  int64_t* epoch;         /* out [1]: the number of this operation */
  int64_t num_tokens;
  int64_t max_tokens;
  int64_t hidden; /* H, 1..2^28 */
  int64_t out_stride;
  int32_t top_k;
  int32_t direct;
  kimi_dtype dtype;
  kimi_dtype wire_dtype; /* what results travel in */
  int32_t num_blocks;
  int32_t num_local;
  kimi_all_to_all_phase phases;
} kimi_all_to_all_combine_params;

KIMI_API kimi_status kimi_all_to_all_combine(const kimi_all_to_all_combine_params* params,
                                             kimi_device device, void* stream);

/* Bytes of a buffer that serves dispatches and combines of these shapes: peers.world,
 * peers.halves, max_tokens, row_bytes, beside_bytes, num_experts, top_k, direct of the one are
 * read, max_tokens, hidden, wire_dtype of the other. */
KIMI_API size_t kimi_all_to_all_buffer_bytes(const kimi_all_to_all_dispatch_params* dispatch,
                                             const kimi_all_to_all_combine_params* combine);

#ifdef __cplusplus
}
#endif

#endif /* KIMI_OPS_PARALLEL_H_ */
