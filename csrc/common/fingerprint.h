// A 64-bit hash of every byte of an array: what is derived from a tensor and kept is used only
// while this hash of the tensor is the same.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace mbm {

// The structure of XXH3 (Collet, github.com/Cyan4973/xxHash): eight accumulators of 64 bits take
// 64 bytes at a time, each word's halves multiplied after an XOR with a key of its place, and are
// scrambled every KiB; pieces of 256 KiB are hashed apart and their hashes combined in order. A
// change within one word always changes the accumulators; of other changes one in 2^64 is missed.
// data [bytes], read only; may be null if bytes is 0. The same for any num_threads.
MBM_PER_ISA(uint64_t, fingerprint, (const unsigned char* data, int64_t bytes, int num_threads))

}  // namespace mbm
