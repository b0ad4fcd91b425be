// A block of int64 fields: all of a native call that stays the same while the addresses change.
// Python fills it once, by the names of the fields (_core/native.py: block).
//
//   #define MBM_THING_PROBLEM(FIELD) FIELD(rows) FIELD(columns)
//   struct ThingProblem {
//     MBM_PROBLEM_FIELDS("thing_problem_fields", MBM_THING_PROBLEM)
//     void check() const;  // throws std::invalid_argument for values that no kernel takes
//   };
//
// A binding exports the names by bind_problem_fields<ThingProblem>(m), from common/bind.h.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>

// clang-format off
#define MBM_PROBLEM_MEMBER(name) int64_t name;
#define MBM_PROBLEM_NAME(name) #name,
#define MBM_PROBLEM_FIELDS(exported, FIELDS)               \
  FIELDS(MBM_PROBLEM_MEMBER)                               \
  static constexpr const char* kFieldsFunction = exported; \
  static constexpr std::array kFields{FIELDS(MBM_PROBLEM_NAME)};
// clang-format on

namespace mbm {

// Throws std::invalid_argument for a block of another size, or what check() throws.
template <class T>
T read_block(std::string_view block) {
  static_assert(std::is_trivially_copyable_v<T>);
  static_assert(sizeof(T) == T::kFields.size() * sizeof(int64_t));
  if (block.size() != sizeof(T))
    throw std::invalid_argument("problem: got " + std::to_string(block.size()) +
                                " bytes; expected " + std::to_string(sizeof(T)) + "; fill it by " +
                                T::kFieldsFunction);
  T problem;
  std::memcpy(&problem, block.data(), sizeof(T));
  problem.check();
  return problem;
}

}  // namespace mbm
