// The execution model that kernels are written against: compiled by nvcc for the device, or with
// MBM_EMULATED by any C++ compiler for the host, where each CUDA thread is a fiber.
//
//   MBM_DEVICE                    before a function that kernels call
//   MBM_KERNEL(threads, blocks)   before a kernel: threads a block, blocks a multiprocessor
//
// In mbm::gpu, on either side:
//   thread() warp() lane() block()          indices; blocks lie along one dimension
//   cluster_rank() cluster_size()           a block's place in its cluster; 0 and 1 without one
//   shared()                                the dynamic shared memory, aligned to 16 bytes
//   block_barrier(site) cluster_barrier(site)   `site` names the barrier to the race checker
//   warp_barrier(site)                      of a full warp
//   store_flag(p, value)                    values of a flag in global memory rise; with release
//   wait_flag(site, p, value)               for this value or a later one, with acquire; the blocks
//                                           that wait and store are of one cooperative launch
//   shuffle_xor(x, mask)                    of a full warp; orders no memory
//   store_peer(p, rank, x)                  *p in another block of the cluster
//   kHasClusters                            false for targets whose kernels of clusters are empty
//   Mbarrier; mbarrier_init(m, arrivals), by one thread, a cluster barrier before its first use
//   mbarrier_expect(m, bytes)               arrives, and adds bytes to what the phase waits for
//   mbarrier_wait(site, m, parity)          for the end of the phase of this parity, 0 the first
//   store_peer_async(p, m, rank, words)     16 bytes, which m of the other block counts
//   mma<T>(d, a, b)                         m16n8k16, m16n8k8 for tf32; elements where mma_layout.h
//                                           says
//   tf32                                    a float whose products are by matrix instructions
//   factor(x)                               x as a product takes it: tf32 rounded to 10 bits
//   reciprocal(x) exp(x)                    to 1 ulp and 2 ulp
//   maximum(x, y)                           NaN where either is
//   to_float(x) from_float<T>(x) store(p, i, x)   elements of any Dtype as float
//   load_words(p) store_words(p, words)     16 bytes on a multiple of 16
//   load_words_l2(p)                        likewise, past the first-level cache
//   store_pair(p, low, high)                8 bytes on a multiple of 8
//   store_bits(p, i, bits)                  an element of 16 bits, the low ones of a word
#pragma once

#ifdef MBM_EMULATED
#include "common/gpu/host.h"
#else
#include "common/gpu/device.cuh"
#endif
