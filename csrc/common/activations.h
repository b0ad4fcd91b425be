// exp, expm1, log, softplus, sigmoid, tanh and erf on vf lanes. NaN passes through; errors are the
// largest measured against float64 over [-20, 20] (tests/core/test_csrc.py measures it).
#pragma once

#include "common/simd.h"

namespace mbm::MBM_ISA {

struct ExpParts {
  vf poly;   // expm1(r) for x = n ln 2 + r, |r| <= ln(2) / 2
  vf scale;  // 2^n
};

// Cephes expf: degree 5 after Cody-Waite reduction. For -87.33 <= x <= 88.37, where 2^n is a normal
// float; anything elsewhere.
inline ExpParts exp_parts_in_range(vf x) {
  const vf magic = set1(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest integer
  const vf shifted = x * set1(1.44269504f) + magic;
  const vf n = shifted - magic;
  vf r = x - n * set1(0.693359375f);
  r = r + n * set1(2.12194440e-4f);
  vf p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  ExpParts parts;
  parts.poly = fma(p, r * r, r);
  // The low bits of `shifted` hold n in two's complement.
  parts.scale = (vf)(((vi)shifted + 127) << 23);
  return parts;
}

// Clamped to that range; operand order keeps NaN.
inline ExpParts exp_parts(vf x) {
  return exp_parts_in_range(min(set1(88.3762626f), max(set1(-87.3365447f), x)));
}

// 2.5 ulp. Saturates at 2.4e38 above 88.37 and at 1.2e-38 below -87.33.
inline vf exp(vf x) {
  const ExpParts e = exp_parts(x);
  return fma(e.poly, e.scale, e.scale);
}

inline vf exp_in_range(vf x) {  // as exp_parts_in_range
  const ExpParts e = exp_parts_in_range(x);
  return fma(e.poly, e.scale, e.scale);
}

inline vf expm1(vf x) {
  const ExpParts e = exp_parts(x);
  return fma(e.poly, e.scale, e.scale - set1(1.0f));
}

// Cephes logf, 1 ulp, for normal numbers above 0; NaN for NaN and infinity.
inline vf log(vf x) {
  // Unsigned, since outside the domain the differences wrap.
  const vu bits = (vu)x;
  const vi exponent = (vi)(bits - 0x3f3504f3u) >> 23;  // the mantissa from sqrt(1/2) on
  const vf n = __builtin_convertvector(exponent, vf);
  const vf f = (vf)(bits - ((vu)exponent << 23)) - set1(1.0f);
  vf p = set1(7.0376836292e-2f);
  p = fma(p, f, set1(-1.1514610310e-1f));
  p = fma(p, f, set1(1.1676998740e-1f));
  p = fma(p, f, set1(-1.2420140846e-1f));
  p = fma(p, f, set1(1.4249322787e-1f));
  p = fma(p, f, set1(-1.6668057665e-1f));
  p = fma(p, f, set1(2.0000714765e-1f));
  p = fma(p, f, set1(-2.4999993993e-1f));
  p = fma(p, f, set1(3.3333331174e-1f));
  const vf square = f * f;
  vf y = p * (f * square);
  y = fma(n, set1(-2.12194440e-4f), y);
  y = fma(square, set1(-0.5f), y);
  return fma(n, set1(0.693359375f), f + y) + (x - x);
}

// 1.2e-38 where exp() saturates; a probability has to be 0 there. NaN stays.
inline vf exp_or_zero(vf x) { return (vf)((vi)exp(x) & ~(vi)(x < set1(-87.33f))); }

struct Softplus {
  vf value;  // log(1 + e^x)
  vf slope;  // sigmoid(x)
};

// 2.8e-7 relative, both, however small: with e = e^-|x|, log(1 + e) = 2 atanh(e / (2 + e)), which
// lies in [0, 1/3] (minimax polynomial, 4.5e-9), and one division serves both.
inline Softplus softplus(vf x) {
  const vf e = exp_or_zero(-abs(x));
  const vf one = set1(1.0f) + e, two = set1(2.0f) + e, inverse = set1(1.0f) / (one * two);
  const vf t = e * (one * inverse), square = t * t;
  vf p = set1(1.4005999506e-1f);
  p = fma(p, square, set1(1.4000901490e-1f));
  p = fma(p, square, set1(2.0010763684e-1f));
  p = fma(p, square, set1(3.3333208142e-1f));
  const vf twice = t + t;
  Softplus result;
  result.value = max(zero(), x) + fma(p * square, twice, twice);
  const vf positive = (vf)((vi)(x > zero()));
  result.slope = (vf)(((vi)positive & (vi)set1(1.0f)) | (~(vi)positive & (vi)e)) * (two * inverse);
  return result;
}

// 8.9e-8 absolute.
inline vf sigmoid(vf x) { return set1(1.0f) / (set1(1.0f) + exp(-x)); }

// 1.5e-7 absolute, 2.5 ulp: -em / (em + 2) with em = expm1(-2|x|) keeps relative accuracy at 0.
inline vf tanh(vf x) {
  const vf em = expm1(set1(-2.0f) * abs(x));
  return copysign(-em / (em + set1(2.0f)), x);
}

// 1.2e-7 relative. N. Juffa's two polynomials: of x^2 up to 475/512, above of |x| for 1 - exp(.).
inline vf erf(vf x) {
  const vf t = abs(x), s = x * x;
  vf low = set1(-5.96761703e-4f);
  low = fma(low, s, set1(4.99119423e-3f));
  low = fma(low, s, set1(-2.67681349e-2f));
  low = fma(low, s, set1(1.12819925e-1f));
  low = fma(low, s, set1(-3.76125336e-1f));
  low = fma(low, s, set1(1.28379166e-1f));
  low = fma(low, x, x);
  vf r = fma(set1(-1.72853470e-5f), t, set1(3.83197126e-4f));
  r = fma(r, s, fma(set1(-3.88396438e-3f), t, set1(2.42546219e-2f)));
  r = fma(r, t, set1(-1.06777877e-1f));
  r = fma(r, t, set1(-6.34846687e-1f));
  r = fma(r, t, set1(-1.28717512e-1f));
  const vf high = copysign(set1(1.0f) - exp(fma(r, t, -t)), x);
  return t > set1(0.927734375f) ? high : low;
}

}  // namespace mbm::MBM_ISA
