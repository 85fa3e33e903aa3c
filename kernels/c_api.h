// The C interface of libmka.so. Every operation is
//     int mka_<op>_<phase>(const <Op><Phase>Args* args, void* stream)
// which checks its arguments on the host, enqueues on `stream` and returns 0, a cudaError_t, or MKA_REFUSED for sizes
// that it has no kernel for. It never allocates, never waits and never reads device memory on the host, so it can be
// captured into a CUDA graph. Tensors are contiguous, row-major, in the order of the shapes given here.
//
// A struct has int64_t and pointers only (doubles for scalars), so that it has no padding and one layout everywhere.
#ifndef MKA_C_API_H
#define MKA_C_API_H

#include <stdint.h>

#define MKA_API __attribute__((visibility("default")))
#define MKA_REFUSED (-1)

// dtype codes
#define MKA_FP32 0
#define MKA_BF16 1
#define MKA_FP16 2

#ifdef __cplusplus
extern "C" {
#endif

// The sha256 of the sources that the library was made from, in hex.
MKA_API const char* mka_source_hash(void);
// What a cudaError_t means.
MKA_API const char* mka_error_string(int code);

// Recall (mka_megatron/ops/recall). B batch, S slots at hand, C chunk size, n chunks at hand, N chunks of the row,
// H query heads, G KV heads, d channels, W words of a code, T tables of W / T words each, R recalled chunks.

// Means of the keys and values of each chunk, and the sign codes of its summed keys. d is 64, 128 or 256, C 64 or 128.
typedef struct {
  const void* k;           // [B, S, G, d], 16-byte aligned, by its strides
  const void* v;           // [B, S, G, d] or null, by its strides
  const int64_t* lengths;  // [B, n] tokens at the head of each chunk
  const int8_t* planes;    // [64 W, d] of +-1, 16-byte aligned; null: no codes
  const void* centre;      // [G, d] that is taken from every key, or null
  void* k_mean;            // [B, n, G, d] or null
  void* v_mean;            // [B, n, G, d], null with v
  int64_t* codes;          // [B, n, G, W], null with planes
  int64_t k_strides[3];    // elements from a row, a slot, a head to the next; whole 16 bytes
  int64_t v_strides[3];
  int64_t dtype;           // of k, v and the means
  int64_t centre_dtype;
  int64_t batch, slots, chunks, groups, channels, size, words;
} MkaRecallPoolArgs;
MKA_API int mka_recall_pool(const MkaRecallPoolArgs* args, void* stream);

// For each chunk the sum over the last min(16, counts) queries of its document before it, and its code.
typedef struct {
  const void* q;           // [B, S, H, d], 16-byte aligned, by its strides
  const double* before;    // [B, 16, G, d] sums over a group's heads of the last 16 tokens before slot 0, or null
  const int64_t* lengths;  // [B, n] tokens at the head of each chunk
  const int64_t* counts;   // [B, n] tokens of the chunk's document before the chunk
  const int8_t* planes;    // [64 W, d] of +-1, 16-byte aligned; null: no codes
  double* sums;            // [B, n, G, d] integers, multiples of 2^-16
  int64_t* codes;          // [B, n, G, W], null with planes
  int64_t q_strides[3];    // as k's
  int64_t dtype;           // of q
  int64_t batch, slots, chunks, heads, groups, channels, size, words;
} MkaRecallQueriesArgs;
MKA_API int mka_recall_queries(const MkaRecallQueriesArgs* args, void* stream);

// The R candidates nearest to each query chunk: of its document and at least `window` chunks back; ties by number.
typedef struct {
  const int64_t* queries;    // [B, count, G, W] codes of the chunks at hand
  const int64_t* codes;      // [B, stored, G, W] of the row's first chunks
  const int64_t* documents;  // [B, total] document of each chunk of the row, -1: empty
  int64_t* found;            // [B, count, G, R] chunk numbers, ascending, then -1
  int64_t batch, count, groups, words, tables, total, stored;
  int64_t first;             // number of the first chunk at hand
  int64_t window, recalled;
} MkaRecallSelectArgs;
MKA_API int mka_recall_select(const MkaRecallSelectArgs* args, void* stream);

// The same, thread by thread on the CPU with tensors in host memory, and the plans alone: for tests.
MKA_API int mka_host_recall_pool(const MkaRecallPoolArgs* args);
MKA_API int mka_host_recall_queries(const MkaRecallQueriesArgs* args);
MKA_API int mka_host_recall_select(const MkaRecallSelectArgs* args);
MKA_API void mka_host_fixed_point(const float* x, int64_t* out, int64_t count);
// (row, group, item) of `warp` of `block`, and how many blocks there are.
MKA_API int64_t mka_plan_recall_task(
    int64_t block, int64_t warp, int64_t batch, int64_t groups, int64_t count, int64_t* task);
// Candidates of chunk `item` at hand are among the row's chunks [0, this).
MKA_API int64_t mka_plan_recall_candidates(
    int64_t first, int64_t item, int64_t window, int64_t stored, int64_t total);
// Where the `back`-th last token before `chunk` lies: a slot, -k for the k-th last before slot 0, INT64_MIN for none.
MKA_API int64_t mka_plan_recall_recent(
    const int64_t* lengths, int64_t chunk, int64_t tokens_before, int64_t size, int64_t slots, int64_t back);

// ---- route_fuse (contract: mka_megatron/ops/route_fuse)
// One or two streams (keys, values) of [batch, sequence, groups, channels], alike in what is null. x, long_term, y and
// their gradients have the dtype, everything else is fp32. `channels` is a multiple of 16 bytes' worth of elements,
// large tensors are aligned to 16 bytes. x and grad_y may lie within larger tensors: their strides count. `states` are the EMA's states in front of every chunk of
// mka_plan_route_fuse's tokens, [batch, chunks, groups * channels], kept from the forward for the backward pass.
typedef struct {
  const void* x[2];
  const void* long_term[2];  // L3; null: absent
  const float* decay[2];     // L2, [groups, channels]; null: absent
  const float* carry[2];     // [batch, groups, channels]; null: 0
  const float* logits;       // [batch, sequence, routes, levels]
  const float* beta;         // [1]
  const uint8_t* slots;      // [batch, sequence], packed by ops/route_fuse/slots.py
  void* y[2];                // forward
  float* last[2];            // forward: [batch, groups, channels]
  float* states[2];
  const void* grad_y[2];     // backward, from here on
  const float* grad_last[2]; // null: 0
  void* grad_x[2];
  void* grad_long_term[2];
  float* grad_decay[2];
  float* grad_carry[2];      // null: not wanted
  float* grad_logits;
  float* grad_beta;
  void* workspace;           // of mka_route_fuse_workspace_bytes, aligned to 16 bytes, contents do not matter
  int64_t x_strides[6];      // of each stream's x: elements from a row, a slot, a head to the next; whole 16 bytes
  int64_t grad_strides[6];   // the same of grad_y
  int64_t batch, sequence, groups, channels, streams;
  int64_t routes;            // 1 or groups
  int64_t levels;            // 2 or 3, L1 included
  int64_t mode;              // 0 soft, 1 fixed, 2 top1, 3 top2
  int64_t dtype;
} RouteFuseArgs;

// {tokens of a chunk, chunks of a row, channels of a tile, tiles}
MKA_API int mka_plan_route_fuse(const RouteFuseArgs* args, int64_t plan[4]);
// {order in the scan, chunk, row, column, stream, head, first channel, first slot} of the `ticket`-th tile to be worked on
MKA_API int mka_plan_route_fuse_tile(const RouteFuseArgs* args, int64_t ticket, int reverse, int64_t tile[8]);
MKA_API int64_t mka_route_fuse_workspace_bytes(const RouteFuseArgs* args, int backward);
MKA_API int mka_route_fuse_forward(const RouteFuseArgs* args, void* stream);
MKA_API int mka_route_fuse_backward(const RouteFuseArgs* args, void* stream);
// The same blocks and threads one after the other on the host, with pointers to host memory: for tests without a GPU.
MKA_API int mka_host_route_fuse_forward(const RouteFuseArgs* args);
MKA_API int mka_host_route_fuse_backward(const RouteFuseArgs* args);
// {weights, gradient of the logits} of one route over three levels, of which `mask` has the available ones.
MKA_API int mka_host_route(const float logits[3], int mask, int mode, const float grad[3], float result[6]);

// Decode (mka_megatron/ops/decode). B sequences, P pages of C tokens, N chunks of a sequence, H query heads, G KV heads,
// d channels, r rotated channels, W words of a code, T tables of W / T words each, R recalled chunks, Q = 16 queries.

// The attention of each sequence's last token. d is 64, 128 or 256, H/G at most 16; bf16 or fp16.
typedef struct {
  const void* q;            // [B, H, d], 16-byte aligned, as k, v and the summaries
  const float* bias;        // [B, 1 or G, 3] or null
  const void* k;            // [P, C, d]
  const void* v;            // [P, C, d]
  const int32_t* table;     // [B, G, N] page, -1: none
  const int32_t* lengths;   // [B, N]
  const int32_t* chunk;     // [B] the open one, -1: idle
  const void* summary_k;    // [B, G, N, d] or null
  const void* summary_v;    // [B, G, N, d], null with summary_k
  const int32_t* recalled;  // [B, G, R] or null
  void* out;                // [B, H, d]
  float* partial;           // [B, G, splits, H/G, d + 2]; may be null for one split
  int32_t* arrived;         // [B, G], all 0 before a launch and after it; may be null for one split
  int64_t batch, groups, heads, channels, size, chunks;
  int64_t window;           // in chunks
  int64_t recalled_chunks;  // R, 0 without
  int64_t bias_groups;      // 1 or G
  int64_t splits;           // as mka_plan_decode_splits gives it, at most 128
  int64_t dtype;            // of q, k, v, the summaries and out
  double scale;
} MkaDecodeAttendArgs;
MKA_API int mka_decode_attend(const MkaDecodeAttendArgs* args, void* stream);
// The same, lane by lane on the CPU with tensors in host memory: for tests.
MKA_API int mka_host_decode_attend(const MkaDecodeAttendArgs* args);
// Tiles of a sequence whose open chunk is `own`.
MKA_API int64_t mka_plan_decode_tiles(int64_t own, int64_t window, int64_t size, int64_t summarised, int64_t recalled);
// (level, chunk, slot) of tile t, to `out`: a chunk of the window, the first of 16 summaries, a rank of the recalled.
MKA_API void mka_plan_decode_tile(int64_t own, int64_t window, int64_t size, int64_t summarised, int64_t recalled,
                                  int64_t t, int64_t* out);
// First tile of a split.
MKA_API int64_t mka_plan_decode_split(int64_t tiles, int64_t splits, int64_t split);
// How many splits to use for B * G `pairs` of at most `tiles` tiles on a GPU of so many processors.
MKA_API int64_t mka_plan_decode_splits(int64_t pairs, int64_t tiles, int64_t processors);

// x + sum over levels l > 1 of share_l (level_l - x), for keys (and values); the states change in place.
typedef struct {
  const void* x_k;          // [B, G, d] raw keys; null: not fused
  const void* x_v;          // [B, G, d] the same of values
  const void* long_term_k;  // [B, G, d] L3 or null
  const void* long_term_v;
  const float* decay_k;     // [G, d]
  const float* decay_v;
  float* state_k;           // [B, G, d]
  float* state_v;
  void* out_k;              // [B, G, d]
  void* out_v;
  const float* shares;      // [B, share_groups, levels]
  const int32_t* chunk;     // [B]
  const int64_t* position;  // [B]
  int64_t batch, groups, channels, share_groups, levels, dtype;
} MkaDecodeFuseArgs;
MKA_API int mka_decode_fuse(const MkaDecodeFuseArgs* args, void* stream);
MKA_API int mka_host_decode_fuse(const MkaDecodeFuseArgs* args);

// A token more in every open chunk.
typedef struct {
  const void* q;            // [B, H, d] before RoPE; read with code_sum
  const void* key;          // [B, G, d] before RoPE
  const void* rotated;      // [B, G, d] after it
  const void* value;        // [B, G, d]
  void* k;                  // [P, C, d]
  void* v;                  // [P, C, d]
  const int32_t* table;     // [B, G, N]
  int32_t* lengths;         // [B, N]
  const int32_t* chunk;     // [B]
  int64_t* position;        // [B]
  float* sum_k;             // [B, G, d] or null
  float* sum_v;             // [B, G, d], null with sum_k
  int64_t* code_sum;        // [B, G, d] or null
  int64_t* queries;         // [B, 16, G, d], null with code_sum
  int64_t batch, groups, heads, channels, size, chunks, dtype;
} MkaDecodeAppendArgs;
MKA_API int mka_decode_append(const MkaDecodeAppendArgs* args, void* stream);
MKA_API int mka_host_decode_append(const MkaDecodeAppendArgs* args);

// Closes full chunks, and those with a token where force is set. d is at most 256, 64 W planes at most 1024, R at most 256.
typedef struct {
  const float* cos;         // [B, r] at each last token
  const float* sin;         // [B, r]
  const uint8_t* force;     // [B] or null
  const int8_t* planes;     // [64 W, d] of +-1, or null: no codes
  const float* key_bias;    // [G, d] or null
  const int32_t* lengths;   // [B, N]
  int32_t* chunk;           // [B]
  const int64_t* position;  // [B]
  void* summary_k;          // [B, G, N, d] or null
  void* summary_v;          // [B, G, N, d], null with summary_k
  float* sum_k;             // [B, G, d], null with summary_k
  float* sum_v;             // [B, G, d]
  int64_t* codes;           // [B, G, N, W], null with planes
  int32_t* recalled;        // [B, G, R]
  int64_t* code_sum;        // [B, G, d]
  const int64_t* queries;   // [B, 16, G, d]
  int64_t batch, groups, channels, size, chunks, rotated, window, words, tables, recalled_chunks, dtype;
} MkaDecodeCloseArgs;
MKA_API int mka_decode_close(const MkaDecodeCloseArgs* args, void* stream);
MKA_API int mka_host_decode_close(const MkaDecodeCloseArgs* args);

// ---- block_attention (contract: mka_megatron/ops/block_attention)
// B batch, S slots at hand, C chunk size, n = ceil(S / C) chunks at hand, N chunks of the row, w window in chunks,
// h = min(w - 1, first) halo chunks, H query heads, G KV heads, d channels, U summaries, M pages, R recalled chunks.
// A place is what a recall can name: a halo chunk, a chunk at hand, a page, in this order.
// d is 64 or 128, C 64 or 128; bf16 or fp16. Strides are in elements, from a row, a slot, a head to the next, multiples
// of 8 (bias: any, 0 allowed); channels lie side by side; tensors are aligned to 16 bytes.
typedef struct {
  const void* q;             // [B, S, H, d] by its strides
  const void* k;             // [B, hC + S, G, d] by its strides, as v
  const void* v;
  const void* summary_k;     // [B, U, G, d] by its strides; null: no L2
  const void* summary_v;     // null with summary_k
  const void* page_k;        // [B, G, M, C, d]; null: no pages
  const void* page_v;
  const int64_t* page_lengths;  // [B, G, M] tokens at the head of each page
  const int64_t* index;      // [B, n, G, R] places, -1: none; null: no L3
  const float* bias;         // [B, S, 1 or G, 3] by its strides (row, slot, group); null: 0
  const int64_t* lengths;    // [B, N] tokens at the head of each chunk
  const int64_t* documents;  // [B, N], not decreasing over a row's chunks with tokens; -1: empty
  void* out;                 // [B, S, H, d]; 0 on padding
  float* lse;                // [B, H, S] natural logarithm; +inf where a query sees nothing
  const void* grad_out;      // [B, S, H, d] by its strides; backward, from here on
  void* grad_q;              // contiguous, in the shapes of the operands: every element is written
  void* grad_k;
  void* grad_v;
  void* grad_summary_k;      // null without summaries
  void* grad_summary_v;
  void* grad_page_k;         // null without pages
  void* grad_page_v;
  float* grad_bias;          // [B, S, H, 3], a query head's part; null without bias
  void* workspace;           // of mka_block_attention_workspace_bytes, aligned to 16 bytes, contents do not matter
  int64_t q_strides[3];
  int64_t k_strides[3];
  int64_t v_strides[3];
  int64_t summary_k_strides[3];
  int64_t summary_v_strides[3];
  int64_t bias_strides[3];
  int64_t grad_strides[3];   // of grad_out
  int64_t batch, slots, heads, groups, channels;
  int64_t size;              // C
  int64_t first;             // number of the first chunk at hand
  int64_t chunks;            // N
  int64_t summaries;         // U
  int64_t pages;             // M
  int64_t recalled;          // R
  int64_t window;            // w
  int64_t dtype;
  int64_t kernel;            // 0: the best for the device, 1: mma.sync, 2: wgmma (refused where there is none)
  double scale;
} MkaBlockAttentionArgs;
// The workspace of the forward, or of the backward; MKA_REFUSED as the launch would say.
MKA_API int64_t mka_block_attention_workspace_bytes(const MkaBlockAttentionArgs* args, int backward);
MKA_API int mka_block_attention_forward(const MkaBlockAttentionArgs* args, void* stream);
// Needs out and lse of the forward.
MKA_API int mka_block_attention_backward(const MkaBlockAttentionArgs* args, void* stream);
// The same, lane by lane on the CPU with tensors in host memory: for tests.
MKA_API int mka_host_block_attention_forward(const MkaBlockAttentionArgs* args);
MKA_API int mka_host_block_attention_backward(const MkaBlockAttentionArgs* args);

// The plans of block_attention on the CPU, for tests; what the fields mean says mka/block_plan.cuh.
// Fills the workspace of the backward, in host memory, which the functions below read.
MKA_API int mka_plan_block(const MkaBlockAttentionArgs* args);
// {visits of a part, key tiles, items, slots, reductions}: what there is room for.
MKA_API void mka_plan_block_sizes(const MkaBlockAttentionArgs* args, int64_t sizes[5]);
// {row, KV head, chunk at hand, tile of 128 packed query rows} of a block; how many there are.
MKA_API int64_t mka_plan_block_queries(const MkaBlockAttentionArgs* args, int64_t block, int64_t* task);
// How many key tiles of `tile` rows (64 or 128) a query chunk has.
MKA_API int64_t mka_plan_block_tiles(
    const MkaBlockAttentionArgs* args, int64_t tile, int64_t row, int64_t group, int64_t chunk);
// {level, source, first row, slot of the chunk, keys, diagonal} of the t-th.
MKA_API void mka_plan_block_tile(const MkaBlockAttentionArgs* args, int64_t tile, int64_t row, int64_t group,
                                 int64_t chunk, int64_t t, int64_t* found);
// Whether a chunk at hand sees the summary of chunk `number` of its row.
MKA_API int mka_plan_block_summary(const MkaBlockAttentionArgs* args, int64_t row, int64_t chunk, int64_t number);
// {target, row and KV head, first visit, end of visits, slot} of an item.
MKA_API void mka_plan_block_item(const MkaBlockAttentionArgs* args, int64_t item, int64_t* found);
// {source, first row, keys, first chunk number} of an item's target.
MKA_API void mka_plan_block_target(const MkaBlockAttentionArgs* args, int64_t item, int64_t* found);
// {chunk at hand, level, diagonal} of an item's visit; level -1: it sees nothing.
MKA_API void mka_plan_block_visit(const MkaBlockAttentionArgs* args, int64_t item, int64_t visit, int64_t* found);
// {target, row and KV head, first slot, slots} of a reduction.
MKA_API void mka_plan_block_reduction(const MkaBlockAttentionArgs* args, int64_t reduction, int64_t* found);

#ifdef __cplusplus
}
#endif

#endif
