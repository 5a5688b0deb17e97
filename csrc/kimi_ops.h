/* SPDX-License-Identifier: MIT
 *
 * The public C API of kimi_ops, for C99 and C++. It includes kimi_ops_experts.h and
 * kimi_ops_optimizer.h; kimi_ops_parallel.h, for experts on several GPUs, is included by those who
 * want it. docs/c.md shows how to build against it.
 *
 * Conventions
 *   - Every op takes one params struct, the device its pointers live on, and a stream last (a
 *     cudaStream_t for KIMI_DEVICE_CUDA, ignored for KIMI_DEVICE_CPU). CUDA work is queued, not
 *     awaited; nothing is read back to the host, so every op can be captured in a CUDA graph.
 *   - The caller owns all memory: inputs, outputs, workspaces. Nothing is allocated or kept; when a
 *     call returns (on CUDA: when its work has run) nothing is read any more.
 *   - Pointers are aligned as their type is. A workspace is 64-byte aligned, on the op's device, and
 *     has at least the bytes that kimi_<op>_workspace_bytes() asks for, given the same params and
 *     device: its size goes into `workspace_bytes` and is checked. On a CPU that number is for the
 *     calling thread's number of threads and the current instruction set. 0 bytes: NULL is taken.
 *   - Zero-initialise params (`kimi_topk_gate_params p = {0};`), then set every field whose comment
 *     names no default: NULL stands for an optional tensor, 0 for no choice. What has no meaning at
 *     0 (a stride between several rows, a scaling factor, the address of an element) is refused.
 *   - Sizes are numbers of elements unless the name says bytes; a size of 0 is an empty tensor.
 *     Strides count elements too, and lead forwards where the comment does not say "any". Tensors
 *     are row-major and dense unless a stride field says otherwise.
 *   - Functions return KIMI_OK or an error; kimi_last_error() says what was expected, what came and
 *     how to mend it. Arguments are checked before anything is launched or written.
 *   - Thread-safe: calls on different data may run at once; the error text is per thread.
 *   - Structs may grow from version to version: compile with the headers of the library that is
 *     loaded, where kimi_version() equals KIMI_OPS_VERSION.
 *
 * Shape letters: T tokens, E experts, K experts chosen a token (top-k), N sequences of S tokens.
 */
#ifndef KIMI_OPS_H_
#define KIMI_OPS_H_

#include <stddef.h>
#include <stdint.h>

#define KIMI_OPS_VERSION "0.1.0" /* of these headers */

#if defined(_WIN32)
#define KIMI_API
#else
#define KIMI_API __attribute__((visibility("default")))
#endif

/* 32 bits, and in C++ any value is a valid object: a wrong one is refused, not undefined. */
#if defined(__cplusplus)
#define KIMI_ENUM(name) enum name : int32_t
#else
#define KIMI_ENUM(name) enum name
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef KIMI_ENUM(kimi_status){
    KIMI_OK = 0, KIMI_INVALID_ARGUMENT = 1, /* a params field is wrong; nothing was written */
    KIMI_UNSUPPORTED = 2,   /* no engine for this device or architecture in this build */
    KIMI_CUDA_ERROR = 3,    /* the CUDA runtime refused */
    KIMI_INTERNAL_ERROR = 4 /* out of memory, or a defect of this library */
} kimi_status;

typedef KIMI_ENUM(kimi_device){KIMI_DEVICE_CPU = 0, KIMI_DEVICE_CUDA = 1} kimi_device;

typedef KIMI_ENUM(kimi_dtype){KIMI_FLOAT32 = 0, KIMI_BFLOAT16 = 1, KIMI_FLOAT16 = 2} kimi_dtype;

/* ---- the library ---------------------------------------------------------------------------- */

KIMI_API const char* kimi_version(void); /* of the library: KIMI_OPS_VERSION as it was built */
/* Of this thread's last call that failed; it stays until the next one fails. */
KIMI_API const char* kimi_last_error(void);

/* CPU instruction sets, weakest first. The best one that this machine offers is taken; the
 * environment variable KIMI_OPS_ISA (portable | avx2 | avx512 | avx512_bf16 | amx) or kimi_set_isa
 * forces one. */
typedef KIMI_ENUM(kimi_isa){
    KIMI_ISA_PORTABLE = 0, KIMI_ISA_AVX2 = 1, /* AVX2, FMA, F16C */
    KIMI_ISA_AVX512 = 2,                      /* AVX-512 F, BW, VL, DQ, CD */
    KIMI_ISA_AVX512_BF16 = 3,                 /* and its products of bf16 pairs */
    KIMI_ISA_AMX = 4                          /* and AMX-TILE, AMX-BF16, granted by the kernel */
} kimi_isa;

KIMI_API kimi_isa kimi_detected_isa(void);
KIMI_API kimi_isa kimi_current_isa(void);
KIMI_API kimi_status kimi_set_isa(kimi_isa isa); /* refuses one that the machine lacks */
KIMI_API const char* kimi_isa_name(kimi_isa isa);

/* On CUDA the kernels are chosen by the device's compute capability, 10 major + minor. The
 * environment variable KIMI_OPS_SM or kimi_set_max_sm lowers it, so that a newer chip runs an older
 * one's kernels; 0: no limit. */
KIMI_API kimi_status kimi_set_max_sm(int32_t sm); /* 0, or 80 and above */
KIMI_API int32_t kimi_max_sm(void);

/* Whether a row of a product has the same bits however many rows its group has (docs/determinism.md);
 * CPU products of few rows are slower then. At first the environment variable
 * KIMI_OPS_BATCH_INVARIANT (0 | 1), 0 without it. */
KIMI_API void kimi_set_batch_invariant(int wanted);
KIMI_API int kimi_batch_invariant(void);

/* The instruction set whose engine serves CPU tensors of an op ("topk_gate"); NULL: no such op. */
KIMI_API const char* kimi_cpu_engine(const char* op);

/* Threads that CPU ops use from this thread; 0 restores OpenMP's own number. */
KIMI_API kimi_status kimi_set_num_threads(int num_threads);
KIMI_API int kimi_num_threads(void);

/* Asks for 2 MiB pages where memory lies that has not been touched yet; a hint, on Linux. */
KIMI_API void kimi_advise_huge_pages(void* memory, size_t bytes);

/* Architectures in the binary, as "sm_80 sm_90a"; empty for a build without CUDA. */
KIMI_API const char* kimi_cuda_architectures(void);

/* ---- topk_gate: router scores, top-k selection, expert counts ------------------------------- */

typedef KIMI_ENUM(kimi_score_function){
    KIMI_SCORE_SIGMOID = 0, KIMI_SCORE_SOFTMAX = 1,
    KIMI_SCORE_SQRTSOFTPLUS = 2 /* sqrt(log(1 + exp(z))) */
} kimi_score_function;

#define KIMI_TOPK_GATE_MAX_EXPERTS 1024
#define KIMI_TOPK_GATE_MAX_K 32
#define KIMI_TOPK_GATE_EPSILON 1e-20f

/* csrc/topk_gate/topk_gate.h defines the mathematics. */
typedef struct kimi_topk_gate_params {
  const void* logits;         /* [T, E] logits_dtype, row t at logits + t * logits_stride */
  const float* expert_bias;   /* [E] or NULL; acts on the selection only */
  const uint8_t* valid;       /* [T] or NULL; 0 drops the token */
  float* weights;             /* out [T, K] */
  int32_t* indices;           /* out [T, K], best first; -1 for a dropped token */
  int32_t* tokens_per_expert; /* out [E] */
  int64_t num_tokens;         /* T */
  int64_t logits_stride;      /* in elements, usually E */
  int32_t num_experts;        /* E, at most KIMI_TOPK_GATE_MAX_EXPERTS */
  int32_t top_k;              /* K, at most KIMI_TOPK_GATE_MAX_K */
  int32_t num_groups;         /* a divisor of E; 1: no groups */
  int32_t topk_groups;        /* groups that take part, 1..num_groups */
  int32_t group_score_topk;   /* choice scores summed for the score of a group */
  int32_t renormalize;        /* 0 or 1 */
  float scaling_factor;       /* of the weights; not 0 */
  kimi_dtype logits_dtype;
  kimi_score_function score_function;
  int32_t select_logits; /* 0: scores are chosen by, groups score their sums; 1: logits are */
} kimi_topk_gate_params;

KIMI_API kimi_status kimi_topk_gate(const kimi_topk_gate_params* params, kimi_device device,
                                    void* stream);

/* Weights and counts of experts that were chosen elsewhere. */
typedef struct kimi_topk_gate_given_params {
  const void* logits;         /* [T, E] logits_dtype, row t at logits + t * logits_stride */
  const int32_t* given;       /* [T, K]; -1 or E: a slot without an expert */
  const uint8_t* valid;       /* [T] or NULL; 0 drops the token */
  float* weights;             /* out [T, K], 0 in a slot without an expert */
  int32_t* indices;           /* out [T, K]: given, or -1 in a slot without an expert */
  int32_t* tokens_per_expert; /* out [E] */
  int64_t num_tokens;         /* T */
  int64_t logits_stride;      /* in elements, usually E */
  int32_t num_experts;        /* E, at most KIMI_TOPK_GATE_MAX_EXPERTS */
  int32_t top_k;              /* K, at most KIMI_TOPK_GATE_MAX_K */
  int32_t renormalize;        /* 0 or 1 */
  float scaling_factor;
  kimi_dtype logits_dtype;
  kimi_score_function score_function;
} kimi_topk_gate_given_params;

/* Any other id: refused on a CPU; on CUDA a slot without an expert. */
KIMI_API kimi_status kimi_topk_gate_given(const kimi_topk_gate_given_params* params,
                                          kimi_device device, void* stream);

/* d logits from d weights; `indices` of the forward, everything else is recomputed from logits. */
typedef struct kimi_topk_gate_backward_params {
  const float* grad_weights; /* [T, K] */
  const void* logits;        /* [T, E] logits_dtype, row stride logits_stride */
  const int32_t* indices;    /* [T, K]; a slot outside 0..E-1 (-1: dropped) takes no part; where an
                                id is repeated, the gradients of its slots add up */
  void* grad_logits;         /* out [T, E] dense, logits_dtype */
  int64_t num_tokens;
  int64_t logits_stride;
  int32_t num_experts;
  int32_t top_k;
  int32_t renormalize;
  float scaling_factor;
  kimi_dtype logits_dtype;
  kimi_score_function score_function;
} kimi_topk_gate_backward_params;

KIMI_API kimi_status kimi_topk_gate_backward(const kimi_topk_gate_backward_params* params,
                                             kimi_device device, void* stream);

/* ---- balance: what keeps the experts' loads even and the logits small ----------------------- */

/* csrc/balance/balance.h defines the mathematics. Losses are sums in a fixed order: the same bits
 * on every device and for any number of threads. */

typedef struct kimi_update_expert_bias_params {
  float* bias;                   /* in, out [E] */
  const void* tokens_per_expert; /* [E] int32_t, or int64_t where counts_are_int64 */
  int64_t num_experts;           /* E */
  float rate;
  int32_t counts_are_int64; /* 0 or 1 */
  int32_t centered;         /* 0: DeepSeek-V3's rule; 1: Moonlight's, without its mean */
} kimi_update_expert_bias_params;

KIMI_API kimi_status kimi_update_expert_bias(const kimi_update_expert_bias_params* params,
                                             kimi_device device, void* stream);

/* N sequences side by side: of T / N tokens each, or those that end at `offsets`. A token that is
 * not valid, or stands behind the last sequence, is none of theirs; its logits are not read. */

/* How often the tokens of each sequence chose an expert, and how many they are. */
typedef struct kimi_sequence_counts_params {
  const int32_t* indices;     /* [T, K] chosen experts; ids outside 0..E-1 count for none */
  const int32_t* offsets;     /* [N] one past each sequence's last token, ascending; or NULL */
  const uint8_t* valid;       /* [T] or NULL */
  int32_t* tokens_per_expert; /* out [N, E] */
  int32_t* sequence_tokens;   /* out [N] */
  int64_t num_tokens;         /* T, below 2^31 */
  int64_t num_sequences;      /* N; without offsets a divisor of T */
  int32_t num_experts;        /* E, at most KIMI_TOPK_GATE_MAX_EXPERTS */
  int32_t top_k;              /* K, at least 1 */
} kimi_sequence_counts_params;

KIMI_API kimi_status kimi_sequence_counts(const kimi_sequence_counts_params* params,
                                          kimi_device device, void* stream);

typedef struct kimi_sequence_balance_loss_params {
  const void* logits;               /* [T, E] logits_dtype, row t at logits + t * logits_stride */
  const int32_t* tokens_per_expert; /* [N, E] of these tokens or, summed up, of all ranks' */
  const int32_t* sequence_tokens;   /* [N] of the same */
  const int32_t* offsets;           /* [N] or NULL */
  const uint8_t* valid;             /* [T] or NULL */
  float* loss;                      /* out [1] */
  void* workspace;                  /* kimi_sequence_balance_loss_workspace_bytes() */
  size_t workspace_bytes;           /* its size, at least what is asked for */
  int64_t num_tokens;               /* T, below 2^31 */
  int64_t num_sequences;            /* N; without offsets a divisor of T */
  int64_t logits_stride;            /* in elements, usually E */
  int32_t num_experts;              /* E, at most KIMI_TOPK_GATE_MAX_EXPERTS */
  int32_t top_k;                    /* K: ids a token, at least 1 */
  float coefficient;
  kimi_dtype logits_dtype;
  kimi_score_function score_function;
} kimi_sequence_balance_loss_params;

/* Reads num_tokens. */
KIMI_API size_t kimi_sequence_balance_loss_workspace_bytes(
    const kimi_sequence_balance_loss_params* params, kimi_device device);
KIMI_API kimi_status kimi_sequence_balance_loss(const kimi_sequence_balance_loss_params* params,
                                                kimi_device device, void* stream);

typedef struct kimi_sequence_balance_loss_backward_params {
  const float* grad_loss; /* [1], read on the device */
  const void* logits;     /* this and what follows: as in the forward */
  const int32_t* tokens_per_expert;
  const int32_t* sequence_tokens;
  const int32_t* offsets;
  const uint8_t* valid;
  void* grad_logits; /* out [T, E] dense, logits_dtype */
  int64_t num_tokens;
  int64_t num_sequences;
  int64_t logits_stride;
  int32_t num_experts;
  int32_t top_k;
  float coefficient;
  kimi_dtype logits_dtype;
  kimi_score_function score_function;
} kimi_sequence_balance_loss_backward_params;

KIMI_API kimi_status kimi_sequence_balance_loss_backward(
    const kimi_sequence_balance_loss_backward_params* params, kimi_device device, void* stream);

/* Adds to histogram[e] the bins of r = cutoffs[t] - score(logits[t, e]), of every valid token. */
typedef struct kimi_quantile_histogram_params {
  const void* logits;    /* [T, E] logits_dtype, row t at logits + t * logits_stride */
  const float* cutoffs;  /* [T]: the choice score that an expert must reach */
  const float* bounds;   /* [2]: low < high, finite, the ends of the bins, read on the device */
  const uint8_t* valid;  /* [T] or NULL */
  int32_t* histogram;    /* in, out [E, num_bins] */
  int64_t num_tokens;    /* T */
  int64_t logits_stride; /* in elements, usually E */
  int32_t num_experts;   /* E, at most KIMI_TOPK_GATE_MAX_EXPERTS */
  int32_t num_bins;      /* 1..2^20; what lies outside of the bounds goes to the end bins */
  kimi_dtype logits_dtype;
  kimi_score_function score_function;
} kimi_quantile_histogram_params;

KIMI_API kimi_status kimi_quantile_histogram(const kimi_quantile_histogram_params* params,
                                             kimi_device device, void* stream);

typedef struct kimi_z_loss_params {
  const void* logits;     /* [T, E] logits_dtype, row stride logits_stride */
  const uint8_t* valid;   /* [T] or NULL; 0 leaves the token out, its logits are not read */
  float* loss;            /* out [1] */
  float* log_sum_exp;     /* out [T], 0 for a token left out; the backward reads them */
  int32_t* valid_tokens;  /* out [1], how many tokens were not left out */
  void* workspace;        /* kimi_z_loss_workspace_bytes() */
  size_t workspace_bytes; /* its size, at least what is asked for */
  int64_t num_tokens;     /* T, below 2^31 */
  int64_t logits_stride;  /* in elements, usually E */
  int32_t num_experts;    /* E, at most KIMI_TOPK_GATE_MAX_EXPERTS */
  float coefficient;
  kimi_dtype logits_dtype;
} kimi_z_loss_params;

/* Reads num_tokens. */
KIMI_API size_t kimi_z_loss_workspace_bytes(const kimi_z_loss_params* params, kimi_device device);
KIMI_API kimi_status kimi_z_loss(const kimi_z_loss_params* params, kimi_device device,
                                 void* stream);

typedef struct kimi_z_loss_backward_params {
  const float* grad_loss;      /* [1], read on the device */
  const void* logits;          /* [T, E] logits_dtype, row stride logits_stride */
  const float* log_sum_exp;    /* [T] of the forward */
  const int32_t* valid_tokens; /* [1] of the forward */
  void* grad_logits;           /* out [T, E] dense, logits_dtype */
  int64_t num_tokens;
  int64_t logits_stride;
  int32_t num_experts;
  float coefficient;
  kimi_dtype logits_dtype;
} kimi_z_loss_backward_params;

KIMI_API kimi_status kimi_z_loss_backward(const kimi_z_loss_backward_params* params,
                                          kimi_device device, void* stream);

/* ---- permute: token rows to their experts' groups and back ----------------------------------- */

/* csrc/permute/permute.h defines the order and the sums. R = T * K + E * (align - 1) rows. */
typedef struct kimi_permute_plan_params {
  const int32_t* indices;     /* [T, K]; -1 or E: a dropped pair */
  int32_t* row_map;           /* out [T, K]: row of the pair; -1 dropped */
  int32_t* source;            /* out [R]: t * K + k; -1 padding */
  int32_t* offsets;           /* out [E]: one past the last row of each group, padding included */
  int32_t* tokens_per_expert; /* out [E]: without padding */
  void* workspace;            /* kimi_permute_plan_workspace_bytes() */
  size_t workspace_bytes;     /* its size, at least what is asked for */
  int64_t num_tokens;         /* T; R must stay below 2^31 */
  int32_t num_experts;        /* E, at most KIMI_PERMUTE_MAX_EXPERTS */
  int32_t top_k;              /* K, at least 1 */
  int32_t align;              /* rows of a group are a multiple of it; at least 1 */
} kimi_permute_plan_params;

#define KIMI_PERMUTE_MAX_EXPERTS 1024

KIMI_API size_t kimi_permute_plan_workspace_bytes(const kimi_permute_plan_params* params,
                                                  kimi_device device);
/* Any other id: refused on a CPU, where the text names the first; on CUDA it counts as dropped. */
KIMI_API kimi_status kimi_permute_plan(const kimi_permute_plan_params* params, kimi_device device,
                                       void* stream);

/* kimi_topk_gate, and kimi_permute_plan (align 1) of its ids and counts: on CUDA in one launch for
 * few tokens. */
typedef struct kimi_gate_plan_params {
  kimi_topk_gate_params gate;
  int32_t* row_map;       /* out [T, K] */
  int32_t* source;        /* out [T * K]; T * K must stay below 2^31 */
  int32_t* offsets;       /* out [E] */
  void* workspace;        /* kimi_gate_plan_workspace_bytes() */
  size_t workspace_bytes; /* its size, at least what is asked for */
} kimi_gate_plan_params;

KIMI_API size_t kimi_gate_plan_workspace_bytes(const kimi_gate_plan_params* params,
                                               kimi_device device);
KIMI_API kimi_status kimi_gate_plan(const kimi_gate_plan_params* params, kimi_device device,
                                    void* stream);

/* y[row_map[t, k]] = x[t] byte for byte, rows with source -1 zero. */
typedef struct kimi_permute_params {
  const void* x;          /* [T] rows of row_bytes, row t at x + t * x_stride_bytes */
  const int32_t* row_map; /* [T, K] */
  const int32_t* source;  /* [R] */
  void* y;                /* out [R] rows of row_bytes, dense */
  int64_t num_tokens;
  int64_t num_rows; /* R */
  int64_t row_bytes;
  int64_t x_stride_bytes;
  int32_t top_k;
} kimi_permute_params;

KIMI_API kimi_status kimi_permute(const kimi_permute_params* params, kimi_device device,
                                  void* stream);

/* x[t] = sum over k of weights[t, k] * y[row_map[t, k]], in slot order, fp32, rounded once. */
typedef struct kimi_unpermute_params {
  const void* y;          /* [R, H] dtype, row r at y + r * y_stride elements */
  const int32_t* row_map; /* [T, K]; -1 adds nothing */
  const float* weights;   /* [T, K], or NULL for 1 */
  void* x;                /* out [T, H] dense, dtype */
  int64_t num_tokens;
  int64_t hidden; /* H */
  int64_t y_stride;
  int32_t top_k;
  kimi_dtype dtype;
} kimi_unpermute_params;

KIMI_API kimi_status kimi_unpermute(const kimi_unpermute_params* params, kimi_device device,
                                    void* stream);

/* One pass: grad_y[r] = weights[source[r]] * grad_x[source[r] / K], zero for padding, and
 * grad_weights[t, k] = <grad_x[t], y[row_map[t, k]]>, 0 for dropped pairs. */
typedef struct kimi_unpermute_backward_params {
  const void* grad_x;     /* [T, H] dtype, row t at grad_x + t * grad_x_stride elements */
  const void* y;          /* [R, H] dtype, row r at y + r * y_stride elements */
  const int32_t* row_map; /* [T, K] */
  const int32_t* source;  /* [R] */
  const float* weights;   /* [T, K] */
  void* grad_y;           /* out [R, H] dense, dtype */
  float* grad_weights;    /* out [T, K] */
  int64_t num_tokens;
  int64_t num_rows;
  int64_t hidden;
  int64_t grad_x_stride;
  int64_t y_stride;
  int32_t top_k;
  kimi_dtype dtype;
} kimi_unpermute_backward_params;

KIMI_API kimi_status kimi_unpermute_backward(const kimi_unpermute_backward_params* params,
                                             kimi_device device, void* stream);

/* y = the chunks of x in a new order; rows past the last chunk become zero rows at the end. */
typedef struct kimi_sort_chunks_params {
  const void* x;              /* [R] rows of row_bytes, row r at x + r * x_stride_bytes */
  const int32_t* split_sizes; /* [C] rows of each chunk of x, at most R together */
  const int32_t* order;       /* [C] a permutation of 0..C-1 */
  void* y;                    /* out [R] rows of row_bytes, dense */
  int64_t num_rows;           /* R */
  int64_t row_bytes;
  int64_t x_stride_bytes;
  int32_t num_chunks; /* C, at most KIMI_SORT_CHUNKS_MAX */
  int32_t inverse;    /* 1: undo; x is in the new order, split_sizes and order are as before */
} kimi_sort_chunks_params;

#define KIMI_SORT_CHUNKS_MAX 65536

KIMI_API kimi_status kimi_sort_chunks(const kimi_sort_chunks_params* params, kimi_device device,
                                      void* stream);

#ifdef __cplusplus
}
#endif

/* at the end: they use the types above */
#include "kimi_ops_experts.h"
#include "kimi_ops_optimizer.h"

#endif /* KIMI_OPS_H_ */
