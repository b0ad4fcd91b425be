"""Triton's interpreter without its most repeated work, for the tests that run under it.

What is left out gives the same as what is kept: half of an interpreted kernel's time goes into
types of shapes seen before and into checks for overflow whose results nothing reads.
"""

import dataclasses
import functools
from typing import Any

from triton import language
from triton.runtime import interpreter


def leave_out_repeated_work() -> None:
    """Does nothing where Triton is another than those that this knows, or was patched before."""
    patches = (_patch_language_once, _check_no_overflow, _keep_numpy_dtypes, _keep_shapes)
    for patch in (*patches, _keep_equal_shapes, _keep_equal_types):
        try:
            patch()
        except AttributeError:
            continue


def _patch_language_once() -> None:
    """A helper that a kernel calls finds the language patched, as it is at the kernel's launch.

    Triton 3.7's interpreter goes through every name of the language at each call of a helper, which
    is a third of a kernel's time, and changes nothing: what is patched is no builtin any more.
    """
    original = interpreter._patch_lang
    if hasattr(original, "__wrapped__"):
        return

    modules: dict[Any, list[Any]] = {}

    @functools.wraps(original)
    def patch(function: Any) -> Any:
        if function not in modules:
            values = function.__globals__.values()
            modules[function] = [v for v in values if v is language or v is language.core]
        seen = modules[function]
        if seen and not any(language.core.is_builtin(module.load) for module in seen):
            return interpreter._LangPatchScope()
        return original(function)

    interpreter._patch_lang = patch


def _check_no_overflow() -> None:
    """Sums and products of integers are computed in 64 bits too and compared, for an assertion
    that only the debug option makes."""
    builder = interpreter.interpreter_builder
    if builder.options.sanitize_overflow and not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _keep_numpy_dtypes() -> None:
    original = interpreter._get_np_dtype
    if hasattr(original, "__wrapped__"):
        return
    kept: dict[str, Any] = {}

    @functools.wraps(original)
    def numpy_dtype(dtype: Any) -> Any:
        scalar = dtype.scalar
        found = kept.get(scalar.name)
        if found is None:
            found = kept[scalar.name] = original(scalar)
        return found

    interpreter._get_np_dtype = numpy_dtype


def _keep_shapes() -> None:
    """Blocks and tensors of one shape share its tuples, and blocks of one type are one object."""
    block, tensor, constexpr = language.block_type, language.tensor, language.constexpr
    init_block, init_tensor, with_element = block.__init__, tensor.__init__, block.with_element_ty
    if hasattr(init_block, "__wrapped__"):
        return
    of_blocks: dict[tuple[int, ...], tuple[Any, int, str]] = {}
    of_tensors: dict[tuple[int, ...], tuple[Any, Any]] = {}
    blocks: dict[tuple[str, str], Any] = {}

    @functools.wraps(init_block)
    def new_block(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple([s.value if isinstance(s, constexpr) else s for s in shape])
        if sizes not in of_blocks:
            init_block(self, element_ty, shape)
            of_blocks[sizes] = (self.shape, self.numel, str(self.shape))
            return
        self.element_ty = element_ty
        self.shape, self.numel, text = of_blocks[sizes]
        self.name = f"<{text}, {element_ty}>"

    @functools.wraps(init_tensor)
    def new_tensor(self: Any, handle: Any, type: Any) -> None:
        sizes = tuple(type.shape.values) if type.is_block() else ()
        if sizes not in of_tensors:
            init_tensor(self, handle, type)
            of_tensors[sizes] = (self.shape, self.numel)
            return
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = of_tensors[sizes]

    @functools.wraps(with_element)
    def of_element(self: Any, scalar_ty: Any) -> Any:
        key = self.name, scalar_ty.name
        if key not in blocks:
            blocks[key] = with_element(self, scalar_ty)
        return blocks[key]

    block.__init__, tensor.__init__, block.with_element_ty = new_block, new_tensor, of_element
    # The name holds the shape and the type of the elements.
    block.__eq__ = lambda self, other: isinstance(other, block) and self.name == other.name


def _keep_equal_shapes() -> None:
    """What has one shape already is not compared size by size to be broadcast."""
    semantic = interpreter.TritonSemantic
    original = semantic.broadcast_impl_value
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def broadcast(self: Any, lhs: Any, rhs: Any) -> Any:
        one, other = lhs.type, rhs.type
        if one.is_block() and other.is_block() and one.shape is other.shape:
            return lhs, rhs
        return original(self, lhs, rhs)

    semantic.broadcast_impl_value = broadcast


def _keep_equal_types() -> None:
    """Operands of one type, in which the operation is computed, stay as they are, and a number
    takes a block's type. NumPy repeats what is one number for a block."""
    semantic, tensor = interpreter.TritonSemantic, language.tensor
    original = semantic.binary_op_type_checking_impl
    if hasattr(original, "__wrapped__"):
        return
    integers = {language.int32.name, language.int64.name}
    names = {language.float32.name, *integers}

    @functools.wraps(original)
    def checked(self: Any, lhs: Any, rhs: Any, *args: Any, **options: Any) -> Any:
        if isinstance(lhs, tensor) and (name := lhs.dtype.name) in names:
            if isinstance(rhs, tensor):
                one, other = lhs.type, rhs.type
                if one is other or one == other:
                    return lhs, rhs
                if one.is_block() and not other.is_block() and rhs.dtype.name == name:
                    return lhs, rhs
            elif (type(rhs) is int and abs(rhs) < 2**31) or (
                type(rhs) is float and name not in integers
            ):
                return lhs, self.scalar_constant(rhs, dtype=lhs.dtype)
        return original(self, lhs, rhs, *args, **options)

    semantic.binary_op_type_checking_impl = checked
