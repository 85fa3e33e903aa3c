// What the sources of block_attention call of each other. Functions that launch return 0, a cudaError_t or MKA_REFUSED.
#pragma once

#include "mka/block_plan.cuh"

namespace mka {
namespace block {

// csrc/block_attention_plan.cu

// Whether the arguments fit together and there is an mma.sync kernel for them; the launches ask it first.
bool possible(const MkaBlockAttentionArgs& a);
// The workspace of a pass.
int64_t plan_bytes(const MkaBlockAttentionArgs& a, bool backward);
// Where everything lies in the workspace: pointers and sizes, to be passed to a kernel by value.
Plan plan_view(const MkaBlockAttentionArgs& a, bool backward);
// Fills the plan in the workspace: the spans, and for the backward the inverse lists and the items.
int enqueue_plan(const MkaBlockAttentionArgs& a, bool backward, cudaStream_t stream);
// The same on the CPU.
void plan_on_host(const MkaBlockAttentionArgs& a, bool backward);

// csrc/block_attention_forward.cu, block_attention_backward.cu: behind enqueue_plan on the same stream

int forward_mma(const MkaBlockAttentionArgs& a, cudaStream_t stream);
int backward_mma(const MkaBlockAttentionArgs& a, cudaStream_t stream);
// Sums the parts of dK and dV that either backward has left in the workspace.
int backward_reduce(const MkaBlockAttentionArgs& a, cudaStream_t stream);

// csrc/block_attention_hopper.cu, block_attention_hopper_backward.cu: also for the device that is current

bool hopper_forward_possible(const MkaBlockAttentionArgs& a);
int forward_hopper(const MkaBlockAttentionArgs& a, cudaStream_t stream);
int forward_hopper_on_host(const MkaBlockAttentionArgs& a);
bool hopper_backward_possible(const MkaBlockAttentionArgs& a);
int backward_hopper(const MkaBlockAttentionArgs& a, cudaStream_t stream);
int backward_hopper_on_host(const MkaBlockAttentionArgs& a);

}  // namespace block
}  // namespace mka
