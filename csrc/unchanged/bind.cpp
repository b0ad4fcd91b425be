// Whether Python objects are as they were: a model's modules, hooks and settings, looked at before
// each call of what was made of them. In Python the same takes ten times as long.
#include "common/bind.h"

#include <pybind11/stl.h>

#include <string>
#include <utility>
#include <vector>

namespace {

enum class Look { kType, kAttribute, kItem, kEmpty, kSize };

// owner: the object whose type or instance attribute is looked at, or the dict. expected: null for
// an attribute or item that there must not be. All are borrowed: the Python side holds them, where
// the garbage collector sees them.
struct Part {
  Look look;
  PyObject* owner;
  PyObject* key;
  PyObject* expected;
  Py_ssize_t size;
};

class Unchanged {
 public:
  void add(const std::string& look, const py::handle& owner, const py::handle& key,
           const py::handle& expected, bool absent, Py_ssize_t size) {
    static const std::vector<std::pair<std::string, Look>> looks{{"type", Look::kType},
                                                                 {"attribute", Look::kAttribute},
                                                                 {"item", Look::kItem},
                                                                 {"empty", Look::kEmpty},
                                                                 {"size", Look::kSize}};
    for (const auto& [name, kind] : looks)
      if (name == look) {
        const bool in_dict = kind == Look::kItem || kind == Look::kSize;
        if (in_dict && !PyDict_Check(owner.ptr())) break;
        parts_.push_back({kind, owner.ptr(), key.ptr(), absent ? nullptr : expected.ptr(), size});
        return;
      }
    throw std::invalid_argument("look: got " + look +
                                "; expected type, attribute, empty, or item or size of a dict");
  }

  bool check() const {
    PyObject* known = nullptr;  // the object whose attributes `held` are
    py::object held;
    for (const Part& part : parts_) {
      if (part.look == Look::kType) {
        if (reinterpret_cast<PyObject*>(Py_TYPE(part.owner)) != part.expected) return false;
        continue;
      }
      PyObject* dict = part.owner;
      if (part.look == Look::kAttribute || part.look == Look::kEmpty) {
        if (part.owner != known) {
          held = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(part.owner, nullptr));
          if (!held) throw py::error_already_set();
          known = part.owner;
        }
        dict = held.ptr();
      }
      if (part.look == Look::kSize) {
        if (PyDict_GET_SIZE(dict) != part.size) return false;
        continue;
      }
      PyObject* found = PyDict_GetItemWithError(dict, part.key);
      if (found == nullptr && PyErr_Occurred()) throw py::error_already_set();
      if (part.look == Look::kEmpty) {
        if (found == nullptr || !PyDict_Check(found) || PyDict_GET_SIZE(found) != 0) return false;
      } else if (found != part.expected) {
        return false;
      }
    }
    return true;
  }

 private:
  std::vector<Part> parts_;
};

void bind_unchanged(py::module_& m) {
  py::class_<Unchanged>(m, "Unchanged")
      .def(py::init<>())
      .def("add", &Unchanged::add)
      .def("check", &Unchanged::check);
}

const Binding registered(bind_unchanged);

}  // namespace
