/* Views of images: native.py's work, see there for what it promises and apply.py for what it means.
 *
 * One call makes the views of a whole batch: crop, resize, flip, jitter, grayscale, blur, solarize. It knows no Python,
 * keeps no state between calls, and takes its scratch memory in one block a call, so any number of threads may call it.
 *
 * Same bytes on every machine. The antialiased resize is in integers, with the arithmetic of torch's uint8 kernel
 * (itself Pillow's): 16-bit weights, rows rounded to bytes between the two passes. Boxes stay whole pixels of the full
 * image where the image was decoded at a fraction of its size. All else is float32, built without
 * contraction into fused operations and without reassociation, and sums run over a fixed number of lanes: wider
 * registers do more lanes at once, never other sums. The few double operations (weights) use no library.
 *
 * A view is made row by row while the row is in the first cache: rows of the crop are resized across into a ring,
 * which is resized down, coloured, blurred across into a second ring, and that blurred down into the output. Only
 * contrast, which needs the mean of the whole view, makes the floats of a view wait in memory. Rows are planar (red,
 * green, blue apart) and padded to whole registers; what stands in the padding is finite and never stored.
 */
#include <float.h>
#include <math.h> /* fabsf, which is an instruction */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __has_feature /* clang's way of saying it */
#if __has_feature(address_sanitizer) && !defined(__SANITIZE_ADDRESS__)
#define __SANITIZE_ADDRESS__ 1
#endif
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

#if defined(__FAST_MATH__) || FLT_EVAL_METHOD != 0
#error "results would depend on the machine: float arithmetic must be IEEE 754 single, and -ffast-math off"
#endif
#ifdef __clang__
#pragma STDC FP_CONTRACT OFF /* GCC takes it as an option only: setup.py */
#endif

#ifndef __GNUC__
#error "needs GCC or clang"
#endif
#define INLINE static inline __attribute__((always_inline)) /* into a caller for each instruction set, below */
#define EXPORT __attribute__((visibility("default")))

#ifdef __x86_64__
#define X86 1
#include <immintrin.h>
#define AVX2_CODE __attribute__((target("avx2")))
#define AVX512_CODE __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#else
#define X86 0
#endif

/* Numbers and layouts shared with native.py, which says VERSION in every call. */
enum { VERSION = 2 };
enum { DONE, OTHER_VERSION, NO_MEMORY, BAD_SIZE, BAD_BOX, BAD_REDUCTION };
enum { BRIGHTNESS, CONTRAST, SATURATION, HUE, NOTHING }; /* `operations` of a view */
enum { PLAIN, AVX2, AVX512 };                            /* instruction sets */

struct view {
    int32_t top, left, height, width; /* of the crop, in pixels of the full image */
    float brightness, contrast, saturation, hue;
    float sigma; /* 0 for no blur */
    uint8_t operations[4];
    uint8_t flip, grayscale, solarize;
    uint8_t unused;
};
_Static_assert(sizeof(struct view) == 44, "native.py's _VIEW");

struct job {
    int32_t version;
    int32_t level;                /* best instruction set allowed; becomes the one used */
    int32_t size;                 /* side of a view */
    int32_t paper;                /* the policy's flavour, else torchvision */
    int32_t bicubic;              /* else bilinear */
    int32_t taps;                 /* of the blur, odd */
    float threshold;              /* of solarize */
    int32_t unused;
    int64_t images, views;        /* views of each image */
    const uint8_t *const *pixels; /* of each image, (height, width, 3) */
    const int32_t *sizes;         /* height, width and reduction of each image: a pixel stands for the square of that
                                     side of the full image; 1, 2, 4 or 8 */
    const struct view *draws;     /* (images, views) */
    uint8_t *out;                 /* (images, views, size, size, 3) */
    int64_t bad;                  /* image of a BAD_SIZE (-1: the view's) or BAD_REDUCTION, draw of a BAD_BOX */
};

enum { LARGEST_VIEW = 4096, LONGEST_SIDE = 1 << 20 }; /* keep products of sizes within 64 bits, with room */
enum { LANES = 16, PAD = 32 };                        /* floats in the widest register; rows are multiples of PAD */

/* --- weights of a resize ------------------------------------------------------------------------------------- */

/* A crop along one axis. Pixels are those of the full image, inputs those of the image as it was decoded, each of which
 * stands for `reduction` pixels. */
struct span {
    int32_t length; /* pixels of the crop */
    int32_t reduction;
    int32_t first;  /* the first input that the crop reaches into, */
    int32_t before; /* and how many of its pixels lie before the crop */
    int32_t inputs; /* how many inputs the crop reaches into */
};

static struct span span_of(int32_t start, int32_t length, int32_t reduction)
{
    const int32_t before = start % reduction;
    return (struct span){length, reduction, start / reduction, before, (before + length + reduction - 1) / reduction};
}

struct axis {
    int32_t precision; /* weights are multiples of 2^-precision */
    int32_t taps;      /* places for weights of each output, the last ones 0 */
    int32_t *start;    /* first input of each output */
    int32_t *count;    /* inputs of each output */
    int16_t *weight;   /* (outputs, taps) */
};

/* Inputs from one output to the next. */
static double scale_of(const struct span *in, int32_t out)
{
    return (double)in->length / ((double)in->reduction * out);
}

static double support_of(const struct span *in, int32_t out, int bicubic)
{
    const double scale = scale_of(in, out);
    return (bicubic ? 2.0 : 1.0) * (scale > 1.0 ? scale : 1.0);
}

static int64_t most_taps(const struct span *in, int32_t out, int bicubic)
{
    return 2 * ((int64_t)support_of(in, out, bicubic) + 1) + 1;
}

static double filter(double x, int bicubic)
{
    x = x < 0 ? -x : x;
    if (!bicubic)
        return x < 1.0 ? 1.0 - x : 0.0;
    if (x < 1.0)
        return (1.5 * x - 2.5) * x * x + 1.0; /* Keys' cubic at a = -0.5, as Pillow's */
    return x < 2.0 ? (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5 : 0.0;
}

/* Fill `axis` for `out` outputs of a crop; outputs from `out` to `padded` weigh nothing. `multiple` is what the number
 * of taps is rounded up to. Steps and roundings are those of torch's UpSampleKernel.cpp.
 *
 * A reduced image is resized by the same filter, on its inputs, at the place and scale that the crop has among them.
 * Inputs that the crop reaches into count as whole ones, the others not at all: a crop knows nothing of what is beyond
 * it. Their weights have 15 bits at most, with which the twin's float32 sums are exact (resize.py). */
static void make_axis(struct axis *axis, const struct span *in, int32_t out, int32_t padded, int bicubic, int multiple,
                      int reverse, double *exact)
{
    const double scale = scale_of(in, out), support = support_of(in, out, bicubic);
    const double shrink = scale >= 1.0 ? 1.0 / scale : 1.0, origin = (double)in->before / in->reduction;
    const int64_t places = most_taps(in, out, bicubic);
    const int32_t finest = in->reduction > 1 ? 15 : 22;
    double largest = 0.0;
    int32_t taps = 1;
    for (int32_t i = 0; i < out; i++) {
        const int32_t place = reverse ? out - 1 - i : i;
        const double centre = origin + scale * (i + 0.5);
        double *w = exact + place * places, total = 0.0;
        int64_t first = (int64_t)(centre - support + 0.5), last = (int64_t)(centre + support + 0.5);
        first = first < 0 ? 0 : first;
        last = last > in->inputs ? in->inputs : last;
        const int32_t count = (int32_t)(last - first);
        for (int32_t k = 0; k < count; k++)
            total += w[k] = filter(((double)(k + first) - centre + 0.5) * shrink, bicubic);
        for (int32_t k = 0; k < count; k++) {
            w[k] /= total;
            largest = w[k] > largest ? w[k] : largest;
        }
        axis->start[place] = (int32_t)first;
        axis->count[place] = count;
        taps = count > taps ? count : taps;
    }
    int32_t precision = 0;
    while (precision < finest && (int32_t)(0.5 + largest * (1 << (precision + 1))) < 1 << 15)
        precision++;
    taps = (taps + multiple - 1) / multiple * multiple;
    axis->precision = precision;
    axis->taps = taps;
    memset(axis->weight, 0, sizeof(int16_t) * (size_t)padded * (size_t)taps);
    for (int32_t i = 0; i < out; i++)
        for (int32_t k = 0; k < axis->count[i]; k++) {
            const double w = exact[i * places + k] * (1 << precision);
            axis->weight[(int64_t)i * taps + k] = (int16_t)(w < 0 ? w - 0.5 : w + 0.5);
        }
    for (int32_t i = out; i < padded; i++)
        axis->start[i] = axis->count[i] = 0;
}

/* The two nearest inputs on each side, in flavour paper: resize.py. */
enum { KEYS = 4 };

struct keys {
    int32_t *start; /* first of KEYS inputs of each output, which may end behind the last */
    float *weight;  /* (outputs, KEYS) */
};

static void make_keys(struct keys *axis, int32_t in, int32_t out, int32_t padded, int reverse)
{
    memset(axis->start, 0, sizeof(int32_t) * (size_t)padded);
    memset(axis->weight, 0, sizeof(float) * KEYS * (size_t)padded);
    for (int32_t i = 0; i < out; i++) {
        const int32_t place = reverse ? out - 1 - i : i;
        const double centre = (i + 0.5) * ((double)in / out) - 0.5; /* -0.5 or more */
        const int32_t nearest = (int32_t)(centre + 1.0) - 1;        /* at or before the centre */
        const int32_t first = nearest - 1, last = in > KEYS ? in - KEYS : 0;
        const int32_t start = first < 0 ? 0 : first > last ? last : first;
        double w[KEYS], total = 0.0;
        for (int k = 0; k < KEYS; k++) {
            const int32_t input = first + k;
            w[k] = input < 0 || input >= in ? 0.0 : filter(centre - input, 1);
            total += w[k];
        }
        for (int k = 0; k < KEYS; k++)
            if (w[k] != 0.0)
                axis->weight[KEYS * place + first + k - start] = (float)(w[k] / total);
        axis->start[place] = start;
    }
}

/* --- resize: bytes to bytes, in integers, so that each version gives the same ------------------------------------ */

INLINE uint8_t byte_of(int32_t level)
{
    return (uint8_t)(level < 0 ? 0 : level > 255 ? 255 : level);
}

/* One RGB row to a planar row of `padded` outputs a channel. */
static void across_plain(uint8_t *restrict out, const uint8_t *row, const struct axis *axis, int32_t padded)
{
    const int32_t half = 1 << (axis->precision - 1), taps = axis->taps;
    for (int32_t x = 0; x < padded; x++) {
        const uint8_t *p = row + 3 * (int64_t)axis->start[x];
        const int16_t *w = axis->weight + (int64_t)x * taps;
        int32_t red = half, green = half, blue = half;
        for (int32_t k = 0; k < taps; k++) {
            red += w[k] * p[3 * k];
            green += w[k] * p[3 * k + 1];
            blue += w[k] * p[3 * k + 2];
        }
        out[x] = byte_of(red >> axis->precision);
        out[x + padded] = byte_of(green >> axis->precision);
        out[x + 2 * padded] = byte_of(blue >> axis->precision);
    }
}

/* The weighted sum of rows of n bytes. */
static void down_plain(uint8_t *restrict out, const uint8_t *const *rows, const int16_t *weight, int32_t count,
                       int32_t precision, int32_t n, int32_t *restrict sums)
{
    for (int32_t x = 0; x < n; x++)
        sums[x] = 1 << (precision - 1);
    for (int32_t k = 0; k < count; k++) {
        const uint8_t *restrict row = rows[k];
        const int32_t w = weight[k];
        for (int32_t x = 0; x < n; x++)
            sums[x] += w * row[x];
    }
    for (int32_t x = 0; x < n; x++)
        out[x] = byte_of(sums[x] >> precision);
}

/* Three rows of n bytes to one row of n pixels. */
static void interleave_plain(uint8_t *restrict out, const uint8_t *red, const uint8_t *green, const uint8_t *blue,
                             int32_t n)
{
    for (int32_t x = 0; x < n; x++) {
        out[3 * x] = red[x];
        out[3 * x + 1] = green[x];
        out[3 * x + 2] = blue[x];
    }
}

#if X86

/* Weights as the sums of products of 16-bit pairs want them: for each four taps, 4 times (w0, w1) for the low half of
 * a register and 4 times (w2, w3) for the high half. */
static void spread_weights(int16_t *table, const struct axis *axis, int32_t padded)
{
    const int64_t fours = (int64_t)padded * axis->taps / 4;
    for (int64_t i = 0; i < fours; i++)
        for (int j = 0; j < 16; j++)
            table[16 * i + j] = axis->weight[4 * i + 2 * (j / 8) + j % 2];
}

/* One output before rounding: sums of taps 0, 1, 4, 5, ... (red, green, blue, waste) in the low half, of the others in
 * the high half. Reads 12 bytes for each four taps, and 4 more. */
AVX2_CODE static inline __m256i four_taps(const uint8_t *p, const int16_t *table, int32_t fours)
{
    const __m256i pairs = _mm256_setr_epi8(0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1, /**/
                                           6, -1, 9, -1, 7, -1, 10, -1, 8, -1, 11, -1, -1, -1, -1, -1);
    __m256i sum = _mm256_setzero_si256();
    for (int32_t k = 0; k < fours; k++) {
        const __m256i four = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(p + 12 * k)));
        const __m256i weights = _mm256_loadu_si256((const __m256i *)(table + 16 * k));
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_shuffle_epi8(four, pairs), weights));
    }
    return sum;
}

/* Four outputs, rounded: 16-bit red, green, blue, waste of outputs 0 and 2 in the low half, 1 and 3 in the high one. */
AVX2_CODE static inline __m256i four_outputs(const uint8_t *row, const int32_t *start, const int16_t *table,
                                             int32_t fours, __m256i half, __m128i precision)
{
    const __m256i a = four_taps(row + 3 * (int64_t)start[0], table, fours);
    const __m256i b = four_taps(row + 3 * (int64_t)start[1], table + 16 * (int64_t)fours, fours);
    const __m256i c = four_taps(row + 3 * (int64_t)start[2], table + 32 * (int64_t)fours, fours);
    const __m256i d = four_taps(row + 3 * (int64_t)start[3], table + 48 * (int64_t)fours, fours);
    __m256i ab = _mm256_add_epi32(_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31));
    __m256i cd = _mm256_add_epi32(_mm256_permute2x128_si256(c, d, 0x20), _mm256_permute2x128_si256(c, d, 0x31));
    ab = _mm256_sra_epi32(_mm256_add_epi32(ab, half), precision);
    cd = _mm256_sra_epi32(_mm256_add_epi32(cd, half), precision);
    return _mm256_packs_epi32(ab, cd);
}

/* `across_plain` for two rows at once, which share the loads of weights and fill the halves of a register. */
AVX2_CODE static inline void across_fours(uint8_t *out0, uint8_t *out1, const uint8_t *row0, const uint8_t *row1,
                                          const struct axis *axis, const int16_t *table, int32_t padded, int32_t fours)
{
    const int32_t *starts = axis->start;
    const __m256i half = _mm256_set1_epi32(1 << (axis->precision - 1));
    const __m128i precision = _mm_cvtsi32_si128(axis->precision);
    const __m256i in_order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m256i planar = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15, /**/
                                            0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    for (int32_t x = 0; x < padded; x += 16) {
        __m256i four[4]; /* for each row: 4 reds, 4 greens, 4 blues, waste */
        for (int q = 0; q < 4; q++) {
            const int32_t *start = starts + x + 4 * q;
            const int16_t *t = table + 16 * (int64_t)(x + 4 * q) * fours;
            const __m256i a = four_outputs(row0, start, t, fours, half, precision);
            const __m256i b = four_outputs(row1, start, t, fours, half, precision);
            four[q] = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(a, b), in_order);
            four[q] = _mm256_shuffle_epi8(four[q], planar);
        }
        const __m256i low01 = _mm256_unpacklo_epi32(four[0], four[1]), low23 = _mm256_unpacklo_epi32(four[2], four[3]);
        const __m256i high01 = _mm256_unpackhi_epi32(four[0], four[1]);
        const __m256i high23 = _mm256_unpackhi_epi32(four[2], four[3]);
        const __m256i channels[3] = {_mm256_unpacklo_epi64(low01, low23), _mm256_unpackhi_epi64(low01, low23),
                                     _mm256_unpacklo_epi64(high01, high23)};
        for (int c = 0; c < 3; c++) {
            _mm_storeu_si128((__m128i *)(out0 + x + c * padded), _mm256_castsi256_si128(channels[c]));
            _mm_storeu_si128((__m128i *)(out1 + x + c * padded), _mm256_extracti128_si256(channels[c], 1));
        }
    }
}

AVX2_CODE static void across_avx2(uint8_t *out0, uint8_t *out1, const uint8_t *row0, const uint8_t *row1,
                                  const struct axis *axis, const int16_t *table, int32_t padded)
{
    switch (axis->taps / 4) { /* constants unroll the loops of most crops */
    case 1:
        across_fours(out0, out1, row0, row1, axis, table, padded, 1);
        break;
    case 2:
        across_fours(out0, out1, row0, row1, axis, table, padded, 2);
        break;
    default:
        across_fours(out0, out1, row0, row1, axis, table, padded, axis->taps / 4);
    }
}

/* `down_plain` by pairs of rows; an odd last row is paired with itself at weight 0. n is a multiple of 32. */
AVX2_CODE static void down_avx2(uint8_t *out, const uint8_t *const *rows, const int16_t *weight, int32_t count,
                                int32_t precision, int32_t n)
{
    const __m256i zero = _mm256_setzero_si256(), half = _mm256_set1_epi32(1 << (precision - 1));
    const __m128i shift = _mm_cvtsi32_si128(precision);
    for (int32_t x = 0; x < n; x += 32) {
        __m256i s0 = half, s1 = half, s2 = half, s3 = half;
        for (int32_t k = 0; k < count; k += 2) {
            int32_t pair;
            memcpy(&pair, weight + k, sizeof pair);
            const __m256i w = _mm256_set1_epi32(pair);
            const __m256i a = _mm256_loadu_si256((const __m256i *)(rows[k] + x));
            const __m256i b = _mm256_loadu_si256((const __m256i *)(rows[k + 1 < count ? k + 1 : k] + x));
            const __m256i low = _mm256_unpacklo_epi8(a, b), high = _mm256_unpackhi_epi8(a, b);
            s0 = _mm256_add_epi32(s0, _mm256_madd_epi16(_mm256_unpacklo_epi8(low, zero), w));
            s1 = _mm256_add_epi32(s1, _mm256_madd_epi16(_mm256_unpackhi_epi8(low, zero), w));
            s2 = _mm256_add_epi32(s2, _mm256_madd_epi16(_mm256_unpacklo_epi8(high, zero), w));
            s3 = _mm256_add_epi32(s3, _mm256_madd_epi16(_mm256_unpackhi_epi8(high, zero), w));
        }
        const __m256i low = _mm256_packs_epi32(_mm256_sra_epi32(s0, shift), _mm256_sra_epi32(s1, shift));
        const __m256i high = _mm256_packs_epi32(_mm256_sra_epi32(s2, shift), _mm256_sra_epi32(s3, shift));
        _mm256_storeu_si256((__m256i *)(out + x), _mm256_packus_epi16(low, high));
    }
}

AVX2_CODE static void interleave_avx2(uint8_t *out, const uint8_t *red, const uint8_t *green, const uint8_t *blue,
                                      int32_t n)
{
    /* Bytes 0 to 15, 16 to 31 and 32 to 47 of sixteen pixels: where each takes its reds, greens and blues. */
    const __m128i r0 = _mm_setr_epi8(0, -1, -1, 1, -1, -1, 2, -1, -1, 3, -1, -1, 4, -1, -1, 5);
    const __m128i g0 = _mm_setr_epi8(-1, 0, -1, -1, 1, -1, -1, 2, -1, -1, 3, -1, -1, 4, -1, -1);
    const __m128i b0 = _mm_setr_epi8(-1, -1, 0, -1, -1, 1, -1, -1, 2, -1, -1, 3, -1, -1, 4, -1);
    const __m128i r1 = _mm_setr_epi8(-1, -1, 6, -1, -1, 7, -1, -1, 8, -1, -1, 9, -1, -1, 10, -1);
    const __m128i g1 = _mm_setr_epi8(5, -1, -1, 6, -1, -1, 7, -1, -1, 8, -1, -1, 9, -1, -1, 10);
    const __m128i b1 = _mm_setr_epi8(-1, 5, -1, -1, 6, -1, -1, 7, -1, -1, 8, -1, -1, 9, -1, -1);
    const __m128i r2 = _mm_setr_epi8(-1, 11, -1, -1, 12, -1, -1, 13, -1, -1, 14, -1, -1, 15, -1, -1);
    const __m128i g2 = _mm_setr_epi8(-1, -1, 11, -1, -1, 12, -1, -1, 13, -1, -1, 14, -1, -1, 15, -1);
    const __m128i b2 = _mm_setr_epi8(10, -1, -1, 11, -1, -1, 12, -1, -1, 13, -1, -1, 14, -1, -1, 15);
    int32_t x = 0;
    for (; x + 16 <= n; x += 16) {
        const __m128i r = _mm_loadu_si128((const __m128i *)(red + x));
        const __m128i g = _mm_loadu_si128((const __m128i *)(green + x));
        const __m128i b = _mm_loadu_si128((const __m128i *)(blue + x));
        __m128i *to = (__m128i *)(out + 3 * x);
        _mm_storeu_si128(to, _mm_or_si128(_mm_or_si128(_mm_shuffle_epi8(r, r0), _mm_shuffle_epi8(g, g0)),
                                          _mm_shuffle_epi8(b, b0)));
        _mm_storeu_si128(to + 1, _mm_or_si128(_mm_or_si128(_mm_shuffle_epi8(r, r1), _mm_shuffle_epi8(g, g1)),
                                              _mm_shuffle_epi8(b, b1)));
        _mm_storeu_si128(to + 2, _mm_or_si128(_mm_or_si128(_mm_shuffle_epi8(r, r2), _mm_shuffle_epi8(g, g2)),
                                              _mm_shuffle_epi8(b, b2)));
    }
    interleave_plain(out + 3 * x, red + x, green + x, blue + x, n - x);
}

#endif

/* --- colour: planar rows of floats in levels 0 to 255, n a multiple of PAD ------------------------------------- */

INLINE float least(float a, float b)
{
    return a < b ? a : b;
}

INLINE float most(float a, float b)
{
    return a > b ? a : b;
}

INLINE float clip(float level)
{
    return least(most(level, 0.0f), 255.0f);
}

INLINE float grey_of(float red, float green, float blue) /* colour.GREY */
{
    return 0.2989f * red + 0.587f * green + 0.114f * blue;
}

/* Levels x to level * factor + offset, clipped: brightness and contrast. */
INLINE void stretch(float *restrict row, int32_t n, float factor, float offset)
{
    for (int32_t x = 0; x < n; x++)
        row[x] = clip(row[x] * factor + offset);
}

INLINE void saturate(float *restrict red, float *restrict green, float *restrict blue, int32_t n, float factor)
{
    const float rest = 1.0f - factor;
    for (int32_t x = 0; x < n; x++) {
        const float grey = grey_of(red[x], green[x], blue[x]) * rest;
        red[x] = clip(red[x] * factor + grey);
        green[x] = clip(green[x] * factor + grey);
        blue[x] = clip(blue[x] * factor + grey);
    }
}

INLINE void saturate_hsv(float *restrict red, float *restrict green, float *restrict blue, int32_t n, float factor)
{
    for (int32_t x = 0; x < n; x++) {
        const float high = most(most(red[x], green[x]), blue[x]), low = least(least(red[x], green[x]), blue[x]);
        const float scale = least(high / most(high - low, 1e-9f), factor);
        red[x] = clip((red[x] - high) * scale + high);
        green[x] = clip((green[x] - high) * scale + high);
        blue[x] = clip((blue[x] - high) * scale + high);
    }
}

/* How much of its chroma a channel has at a distance from the sixth where it has least or most of it. */
INLINE float share(float level)
{
    return least(most(level, 0.0f), 1.0f);
}

/* `turn` in sixths of the circle, from 1 to 7: the position below is from -1 to 5, and one subtraction wraps a sum. */
INLINE void turn_hue(float *restrict red, float *restrict green, float *restrict blue, int32_t n, float turn)
{
    for (int32_t x = 0; x < n; x++) {
        const float r = red[x], g = green[x], b = blue[x];
        const float low = least(least(r, g), b), high = most(most(r, g), b), chroma = high - low;
        float sixths = r - g + 4.0f * chroma;
        sixths = high == g ? b - r + 2.0f * chroma : sixths;
        sixths = high == r ? g - b : sixths;
        sixths = sixths / most(chroma, 1e-9f) + turn;
        sixths = sixths >= 6.0f ? sixths - 6.0f : sixths;
        red[x] = share(fabsf(sixths - 3.0f) - 1.0f) * chroma + low;
        green[x] = share(2.0f - fabsf(sixths - 2.0f)) * chroma + low;
        blue[x] = share(2.0f - fabsf(sixths - 4.0f)) * chroma + low;
    }
}

INLINE void drop_colour(float *restrict red, const float *restrict green, const float *restrict blue, int32_t n)
{
    for (int32_t x = 0; x < n; x++)
        red[x] = grey_of(red[x], green[x], blue[x]);
}

INLINE void invert(float *restrict row, int32_t n, float threshold)
{
    for (int32_t x = 0; x < n; x++)
        row[x] = row[x] >= threshold ? 255.0f - row[x] : row[x];
}

INLINE void widen(float *restrict out, const uint8_t *restrict in, int32_t n)
{
    for (int32_t x = 0; x < n; x++)
        out[x] = (float)in[x];
}

INLINE void round_off(uint8_t *restrict out, const float *restrict in, int32_t n)
{
    for (int32_t x = 0; x < n; x++)
        out[x] = (uint8_t)(int32_t)(in[x] + 0.5f);
}

/* Sum of a row in LANES partial sums, whatever the registers. */
INLINE double sum_of(const float *restrict row, int32_t n)
{
    float lane[LANES] = {0};
    int32_t x = 0;
    for (; x + LANES <= n; x += LANES)
        for (int i = 0; i < LANES; i++)
            lane[i] += row[x + i];
    for (int i = 0; x + i < n; i++)
        lane[i] += row[x + i];
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++)
            lane[i] += lane[i + half];
    return lane[0];
}

/* --- blur --------------------------------------------------------------------------------------------------- */

/* exp(-x) for 0 <= x < 40 to 10 digits and more: libraries differ in the last one. */
static double exp_minus(double x)
{
    const double y = -x / 1024;
    double e = 1 + y * (1 + y / 2 * (1 + y / 3 * (1 + y / 4 * (1 + y / 5 * (1 + y / 6)))));
    for (int i = 0; i < 10; i++)
        e *= e;
    return e;
}

/* Weights 0 to radius of the Gaussian, of which the sum over both sides is 1; returns the radius.
 *
 * Outer taps that together weigh at most DUST are left out: a level changes by less than 255 * DUST an axis. */
static int32_t gaussian(float *weight, double *exact, float sigma, int32_t widest)
{
    const double DUST = 2e-4;
    double total = 0.0, dropped = 0.0;
    int32_t radius = 0;
    for (int32_t i = 0; i <= widest; i++) {
        const double exponent = 0.5 * ((double)i / sigma) * ((double)i / sigma);
        if (exponent >= 40)
            break;
        exact[i] = exp_minus(exponent);
        total += i ? 2 * exact[i] : exact[i];
        radius = i;
    }
    while (radius > 0 && dropped + 2 * exact[radius] <= DUST * total)
        dropped += 2 * exact[radius--];
    for (int32_t i = 0; i <= radius; i++)
        weight[i] = (float)(exact[i] / (total - dropped));
    return radius;
}

/* A row or column of the blur: the weighted sum of 2 * radius + 1 rows of n floats, `rows` pointing at the middle. */
INLINE void weigh_rows(float *restrict out, const float *const *rows, const float *weight, int32_t n, int32_t radius)
{
    for (int32_t x = 0; x < n; x++) {
        float sum = weight[0] * rows[0][x];
        for (int32_t k = 1; k <= radius; k++)
            sum += weight[k] * (rows[-k][x] + rows[k][x]);
        out[x] = sum;
    }
}

/* The same of one row with itself, shifted: addresses that the compiler can derive from one. */
INLINE void weigh_shifts(float *restrict out, const float *row, const float *weight, int32_t n, int32_t radius)
{
    for (int32_t x = 0; x < n; x++) {
        float sum = weight[0] * row[x];
        for (int32_t k = 1; k <= radius; k++)
            sum += weight[k] * (row[x - k] + row[x + k]);
        out[x] = sum;
    }
}

/* A constant radius unrolls the inner loop and keeps its sums in registers: three times as fast. 7 serves sigma 2. */
#define WITH_CONSTANT_RADIUS(weigh, ...) \
    switch (radius) { \
    case 1: weigh(__VA_ARGS__, 1); return; \
    case 2: weigh(__VA_ARGS__, 2); return; \
    case 3: weigh(__VA_ARGS__, 3); return; \
    case 4: weigh(__VA_ARGS__, 4); return; \
    case 5: weigh(__VA_ARGS__, 5); return; \
    case 6: weigh(__VA_ARGS__, 6); return; \
    case 7: weigh(__VA_ARGS__, 7); return; \
    }

INLINE void blur_down(float *restrict out, const float *const *rows, const float *weight, int32_t n, int32_t radius)
{
    WITH_CONSTANT_RADIUS(weigh_rows, out, rows, weight, n)
    for (int32_t x = 0; x < n; x++)
        out[x] = weight[0] * rows[0][x];
    for (int32_t k = 1; k <= radius; k++) {
        const float *before = rows[-k], *after = rows[k];
        for (int32_t x = 0; x < n; x++)
            out[x] += weight[k] * (before[x] + after[x]);
    }
}

INLINE void blur_across(float *restrict out, const float *row, const float *weight, int32_t n, int32_t radius)
{
    WITH_CONSTANT_RADIUS(weigh_shifts, out, row, weight, n)
    for (int32_t x = 0; x < n; x++)
        out[x] = weight[0] * row[x];
    for (int32_t k = 1; k <= radius; k++)
        for (int32_t x = 0; x < n; x++)
            out[x] += weight[k] * (row[x - k] + row[x + k]);
}

/* Index i of n reflected at the ends, which are not doubled; i is at most n - 1 outside. */
INLINE int32_t reflect(int32_t i, int32_t n)
{
    i = i < 0 ? -i : i;
    return i < n ? i : 2 * (n - 1) - i;
}

/* --- one view ----------------------------------------------------------------------------------------------- */

struct work { /* scratch memory of a call, enough for each of its views */
    int32_t padded;                 /* floats or bytes of a row of one channel */
    int32_t widest;                 /* radius of the blur's kernel */
    int32_t radius;                 /* of the view's blur, without dust */
    int32_t channels;               /* 1 once a view is grey */
    struct span rows, columns;      /* of the view's crop */
    struct axis across, down;
    int16_t *table;                 /* across.weight, spread */
    double *exact;                  /* weights before they are rounded */
    uint8_t *source;                /* two rows of the crop, with zeros behind them, */
    int64_t source_stride;          /* and how far apart */
    uint8_t *resized;               /* ring of planar rows resized across */
    const uint8_t **resized_rows;
    int32_t *sums;
    struct keys keys_across, keys_down;
    float *tall;                    /* a row of the crop resized down, in pixels, with zeros behind it */
    uint8_t *levels;                /* a planar row of bytes */
    float *planes;                  /* rows of the view, planar; only the first without contrast */
    float *edged;                   /* a row of one channel with what is beyond its edges */
    float *black;                   /* a planar row beyond the edges, in flavour paper */
    float *gauss;                   /* weights of the blur */
    float *blurred;                 /* ring of planar rows blurred across */
    const float **blurred_rows;
    float *line;                    /* a row of floats */
};

#ifdef __SANITIZE_ADDRESS__
enum { RED_ZONE = 64 };
#define FORBID(start, bytes) __asan_poison_memory_region(start, bytes)
#define PERMIT(start, bytes) __asan_unpoison_memory_region(start, bytes)
#else
enum { RED_ZONE = 0 };
#define FORBID(start, bytes) (void)(start)
#define PERMIT(start, bytes) (void)(start)
#endif

/* `bytes` of the block at an offset that suits any register; nothing of no block, to measure it. Under the address
 * sanitizer nothing between two parts may be touched, or an overrun of one would be hidden by the next. */
static void *cut(char *block, uint64_t *used, uint64_t bytes)
{
    char *part = block ? block + *used : NULL;
    const uint64_t taken = (bytes + RED_ZONE + 63) / 64 * 64;
    if (part)
        FORBID(part + bytes, taken - bytes);
    *used += taken;
    return part;
}

struct most { /* of any crop of a call */
    int32_t height, width; /* inputs */
    int64_t taps_down, taps_across;
};

static struct most measure(const struct job *job)
{
    struct most most = {1, 1, 1, 1};
    for (int64_t i = 0; i < job->images * job->views; i++) {
        const struct view *view = job->draws + i;
        const int32_t reduction = job->sizes[3 * (i / job->views) + 2];
        const struct span rows = span_of(view->top, view->height, reduction);
        const struct span columns = span_of(view->left, view->width, reduction);
        const int64_t down = most_taps(&rows, job->size, job->bicubic);
        const int64_t across = most_taps(&columns, job->size, job->bicubic);
        most.height = rows.inputs > most.height ? rows.inputs : most.height;
        most.width = columns.inputs > most.width ? columns.inputs : most.width;
        most.taps_down = down > most.taps_down ? down : most.taps_down;
        most.taps_across = across > most.taps_across ? across : most.taps_across;
    }
    return most;
}

/* Lay out scratch memory for such crops and views of `size`; returns its bytes. */
static uint64_t lay_out(struct work *work, char *block, const struct most *most, int32_t size, int32_t taps)
{
    const uint64_t padded = (uint64_t)(size + PAD - 1) / PAD * PAD, row = 3 * padded, width = (uint64_t)most->width;
    const uint64_t taps_across = (uint64_t)most->taps_across + 3; /* rounded up to fours, */
    const uint64_t taps_down = (uint64_t)most->taps_down + 1;     /* and to pairs */
    const uint64_t taps_most = taps_across > taps_down ? taps_across : taps_down, widest = (uint64_t)taps / 2;
    uint64_t used = 0;
    work->padded = (int32_t)padded;
    work->widest = (int32_t)widest;
    work->keys_across.start = cut(block, &used, padded * sizeof(int32_t));
    work->keys_across.weight = cut(block, &used, KEYS * padded * sizeof(float));
    work->keys_down.start = cut(block, &used, padded * sizeof(int32_t));
    work->keys_down.weight = cut(block, &used, KEYS * padded * sizeof(float));
    work->tall = cut(block, &used, (3 * (width + KEYS) + 1) * sizeof(float));
    work->across.start = cut(block, &used, padded * sizeof(int32_t));
    work->across.count = cut(block, &used, padded * sizeof(int32_t));
    work->across.weight = cut(block, &used, padded * taps_across * sizeof(int16_t));
    work->table = cut(block, &used, X86 * 4 * padded * taps_across * sizeof(int16_t));
    work->down.start = cut(block, &used, padded * sizeof(int32_t));
    work->down.count = cut(block, &used, padded * sizeof(int32_t));
    work->down.weight = cut(block, &used, padded * taps_down * sizeof(int16_t));
    work->exact = cut(block, &used, (padded * taps_most + widest + 1) * sizeof(double));
    work->source_stride = (int64_t)(3 * (width + taps_across) + 16 + 63) / 64 * 64;
    work->source = cut(block, &used, 2 * (uint64_t)work->source_stride);
    work->resized = cut(block, &used, (taps_down + 2) * row);
    work->resized_rows = cut(block, &used, taps_down * sizeof *work->resized_rows);
    work->sums = cut(block, &used, row * sizeof(int32_t));
    work->levels = cut(block, &used, row);
    work->planes = cut(block, &used, (uint64_t)size * row * sizeof(float));
    work->edged = cut(block, &used, (padded + 2 * widest) * sizeof(float));
    work->blurred = cut(block, &used, (2 * widest + 1) * row * sizeof(float));
    work->blurred_rows = cut(block, &used, (2 * widest + 1) * sizeof *work->blurred_rows);
    work->black = cut(block, &used, row * sizeof(float));
    work->line = cut(block, &used, 4 * padded * sizeof(float));
    work->gauss = cut(block, &used, (widest + 1) * sizeof(float));
    return used;
}

/* Resize rows `first` and `first` + 1 of the crop across, into the ring. */
INLINE void resize_across(struct work *work, const uint8_t *image, int64_t image_stride, int32_t first,
                          int32_t ring_rows, int level)
{
    const int32_t height = work->rows.inputs, width = work->columns.inputs;
    uint8_t *source[2], *out[2];
    for (int i = 0; i < 2; i++) {
        const int32_t y = first + i < height ? first + i : height - 1;
        source[i] = work->source + i * work->source_stride;
        out[i] = work->resized + (int64_t)((first + i) % ring_rows) * 3 * work->padded;
        /* A copy, because taps are read in groups, beyond the end of the crop and perhaps of the image. */
        const uint8_t *row = image + (work->rows.first + y) * image_stride + 3 * (int64_t)work->columns.first;
        memcpy(source[i], row, 3 * (size_t)width);
        if (y + 2 < height) /* large images are not in the cache: fetch the next pair while this one is made */
            for (int32_t x = 0; x < 3 * width; x += 64)
                __builtin_prefetch(row + 2 * image_stride + x);
    }
#if X86
    if (level >= AVX2) {
        across_avx2(out[0], out[1], source[0], source[1], &work->across, work->table, work->padded);
        return;
    }
#endif
    (void)level;
    for (int i = 0; i < 2; i++)
        across_plain(out[i], source[i], &work->across, work->padded);
}

/* Row y of the resized view, from the rows across in the ring, to `levels`. */
INLINE void resize_down(struct work *work, int32_t y, int32_t ring_rows, int level)
{
    const struct axis *axis = &work->down;
    const int32_t first = axis->start[y], count = axis->count[y], n = 3 * work->padded;
    const int16_t *weight = axis->weight + (int64_t)y * axis->taps;
    for (int32_t k = 0; k < count; k++)
        work->resized_rows[k] = work->resized + (int64_t)((first + k) % ring_rows) * n;
#if X86
    if (level >= AVX2) {
        down_avx2(work->levels, work->resized_rows, weight, count, axis->precision, n);
        return;
    }
#endif
    (void)level;
    down_plain(work->levels, work->resized_rows, weight, count, axis->precision, n, work->sums);
}

/* Pixels of four floats, the last one waste, to planar bytes. */
INLINE void separate(uint8_t *restrict red, uint8_t *restrict green, uint8_t *restrict blue, const float *restrict in,
                     int32_t n)
{
    for (int32_t x = 0; x < n; x++) {
        red[x] = (uint8_t)(int32_t)clip(in[4 * x] + 0.5f);
        green[x] = (uint8_t)(int32_t)clip(in[4 * x + 1] + 0.5f);
        blue[x] = (uint8_t)(int32_t)clip(in[4 * x + 2] + 0.5f);
    }
}

typedef float four __attribute__((vector_size(16))); /* red, green, blue, waste; the smallest register has room */

INLINE four load_four(const float *p)
{
    four pixel;
    memcpy(&pixel, p, sizeof pixel);
    return pixel;
}

/* Row y of the view resized in flavour paper, to `levels`: down and then across, in floats, rounded once. */
INLINE void resize_keys(struct work *work, const uint8_t *image, int64_t image_stride, int32_t y)
{
    const int32_t n = work->padded, width = 3 * work->columns.inputs, height = work->rows.inputs;
    const float *w = work->keys_down.weight + KEYS * y;
    const uint8_t *rows[KEYS];
    float *restrict tall = work->tall, *restrict line = work->line;
    for (int k = 0; k < KEYS; k++) {
        const int32_t input = work->keys_down.start[y] + k, row = input < height ? input : height - 1;
        rows[k] = image + (work->rows.first + row) * image_stride + 3 * (int64_t)work->columns.first;
    }
    for (int32_t x = 0; x < width; x++)
        tall[x] = w[0] * rows[0][x] + w[1] * rows[1][x] + w[2] * rows[2][x] + w[3] * rows[3][x];
    for (int32_t x = 0; x < n; x++) {
        const float *p = tall + 3 * (int64_t)work->keys_across.start[x], *weight = work->keys_across.weight + KEYS * x;
        four sum = weight[0] * load_four(p);
        for (int k = 1; k < KEYS; k++)
            sum += weight[k] * load_four(p + 3 * k);
        memcpy(line + 4 * x, &sum, sizeof sum);
    }
    separate(work->levels, work->levels + n, work->levels + 2 * n, line, n);
}

INLINE void operate(struct work *work, const struct job *job, const struct view *view, float *row, int operation,
                    const float *middle)
{
    const int32_t n = work->padded;
    switch (operation) {
    case BRIGHTNESS:
        stretch(row, 3 * n, view->brightness, 0.0f);
        break;
    case CONTRAST:
        for (int c = 0; c < 3; c++)
            stretch(row + c * n, n, view->contrast, middle[c] * (1.0f - view->contrast));
        break;
    case SATURATION:
        if (job->paper)
            saturate_hsv(row, row + n, row + 2 * n, n, view->saturation);
        else
            saturate(row, row + n, row + 2 * n, n, view->saturation);
        break;
    case HUE:
        turn_hue(row, row + n, row + 2 * n, n, view->hue);
        break;
    }
}

/* Solarize a planar row, round it and store it as pixels. */
INLINE void store_row(struct work *work, const struct job *job, const struct view *view, float *row, uint8_t *out,
                      int level)
{
    const int32_t n = work->padded, apart = work->channels == 3 ? n : 0, size = job->size;
    uint8_t *levels = work->levels;
    if (view->solarize)
        invert(row, work->channels * n, job->threshold);
    round_off(levels, row, work->channels * n);
#if X86
    if (level >= AVX2) {
        interleave_avx2(out, levels, levels + apart, levels + 2 * apart, size);
        return;
    }
#endif
    (void)level;
    interleave_plain(out, levels, levels + apart, levels + 2 * apart, size);
}

/* Blur row y across into the ring; then blur down and store the rows that have all their neighbours there. */
INLINE void blur_row(struct work *work, const struct job *job, const struct view *view, const float *row, int32_t y,
                     uint8_t *out, int level)
{
    const int32_t n = work->padded, size = job->size, radius = work->radius, ring_rows = 2 * radius + 1;
    const int64_t stride = 3 * (int64_t)n;
    float *edged = work->edged + radius, *blurred = work->blurred + y % ring_rows * stride;
    for (int32_t c = 0; c < work->channels; c++) {
        memcpy(edged, row + c * (int64_t)n, (size_t)size * sizeof(float));
        for (int32_t i = 1; i <= radius; i++) {
            edged[-i] = job->paper ? 0.0f : edged[i];
            edged[size - 1 + i] = job->paper ? 0.0f : edged[size - 1 - i];
        }
        blur_across(blurred + c * (int64_t)n, edged, work->gauss, n, radius);
    }
    const int32_t last = y == size - 1 ? y : y - radius;
    for (int32_t done = y - radius > 0 ? y - radius : 0; done <= last; done++) {
        for (int32_t i = -radius; i <= radius; i++) {
            const int beyond = done + i < 0 || done + i >= size;
            work->blurred_rows[radius + i] = beyond && job->paper
                                                 ? work->black
                                                 : work->blurred + reflect(done + i, size) % ring_rows * stride;
        }
        blur_down(work->line, work->blurred_rows + radius, work->gauss, work->channels * n, radius);
        store_row(work, job, view, work->line, out + (int64_t)done * 3 * size, level);
    }
}

INLINE void finish_row(struct work *work, const struct job *job, const struct view *view, float *row, int32_t y,
                       uint8_t *out, int level)
{
    if (view->grayscale)
        drop_colour(row, row + work->padded, row + 2 * work->padded, work->padded);
    if (work->radius)
        blur_row(work, job, view, row, y, out, level);
    else
        store_row(work, job, view, row, out + (int64_t)y * 3 * job->size, level);
}

/* Tables of the view's resize, and zeros behind the rows that it reads in groups. */
INLINE void prepare_resize(struct work *work, const struct job *job, const struct view *view, int level)
{
    const int32_t size = job->size, n = work->padded, width = work->columns.inputs;
    if (job->paper) {
        make_keys(&work->keys_across, width, size, n, view->flip);
        make_keys(&work->keys_down, work->rows.inputs, size, n, 0);
        memset(work->tall + 3 * (int64_t)width, 0, (3 * KEYS + 1) * sizeof(float));
        return;
    }
    make_axis(&work->across, &work->columns, size, n, job->bicubic, 4, view->flip, work->exact);
    make_axis(&work->down, &work->rows, size, size, job->bicubic, 2, 0, work->exact);
    for (int i = 0; i < 2; i++)
        memset(work->source + i * work->source_stride + 3 * (int64_t)width, 0, 3 * (size_t)work->across.taps + 16);
#if X86
    if (level >= AVX2)
        spread_weights(work->table, &work->across, n);
#endif
    (void)level;
}

/* `shape`: height, width and reduction of the image. */
INLINE void make_view(struct work *work, const struct job *job, const struct view *view, const uint8_t *image,
                      const int32_t *shape, uint8_t *out, int level)
{
    const int32_t size = job->size, n = work->padded;
    const int64_t image_stride = 3 * (int64_t)shape[1], stride = 3 * (int64_t)n;
    work->rows = span_of(view->top, view->height, shape[2]);
    work->columns = span_of(view->left, view->width, shape[2]);
    prepare_resize(work, job, view, level);
    work->channels = view->grayscale ? 1 : 3;
    work->radius = view->sigma > 0.0f ? gaussian(work->gauss, work->exact, view->sigma, work->widest) : 0;
    if (work->radius) { /* what lies behind the edges is read into padding */
        memset(work->edged, 0, ((size_t)n + 2 * (size_t)work->radius) * sizeof(float));
        memset(work->black, 0, (size_t)stride * sizeof(float));
    }

    int before = 0; /* operations before contrast */
    while (before < 4 && view->operations[before] != CONTRAST)
        before++;
    const int contrast = before < 4;
    const int32_t ring_rows = work->down.taps + 2; /* the window of a row, and rows come in pairs */
    double sum[3] = {0};
    float middle[3] = {0};
    int32_t ready = 0;
    for (int32_t y = 0; y < size; y++) {
        float *row = work->planes + (contrast ? y * stride : 0);
        if (job->paper) {
            resize_keys(work, image, image_stride, y);
        } else {
            for (; ready < work->down.start[y] + work->down.count[y]; ready += 2)
                resize_across(work, image, image_stride, ready, ring_rows, level);
            resize_down(work, y, ring_rows, level);
        }
        widen(row, work->levels, 3 * n);
        for (int i = 0; i < before; i++)
            operate(work, job, view, row, view->operations[i], middle);
        if (contrast) {
            for (int c = 0; c < 3; c++)
                sum[c] += sum_of(row + c * n, size);
            if (y < size - 1)
                continue;
            for (int c = 0; c < 3; c++)
                middle[c] = (float)(sum[c] / ((double)size * size));
            if (!job->paper)
                middle[0] = middle[1] = middle[2] = grey_of(middle[0], middle[1], middle[2]);
        }
        for (int32_t done = contrast ? 0 : y; done <= y; done++) {
            float *waiting = work->planes + (contrast ? done * stride : 0);
            for (int i = before; i < 4; i++)
                operate(work, job, view, waiting, view->operations[i], middle);
            finish_row(work, job, view, waiting, done, out, level);
        }
    }
}

/* --- a batch ------------------------------------------------------------------------------------------------ */

INLINE void make_views(struct work *work, const struct job *job, int level)
{
    const int64_t bytes = 3 * (int64_t)job->size * job->size;
    for (int64_t i = 0; i < job->images * job->views; i++)
        make_view(work, job, job->draws + i, job->pixels[i / job->views], job->sizes + 3 * (i / job->views),
                  job->out + i * bytes, level);
}

static void make_plain(struct work *work, const struct job *job)
{
    make_views(work, job, PLAIN);
}

#if X86
AVX2_CODE static void make_avx2(struct work *work, const struct job *job)
{
    make_views(work, job, AVX2);
}

AVX512_CODE static void make_avx512(struct work *work, const struct job *job)
{
    make_views(work, job, AVX512);
}
#endif

static int best_level(void)
{
#if X86
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        return AVX512;
    if (__builtin_cpu_supports("avx2"))
        return AVX2;
#endif
    return PLAIN;
}

/* Whether all that leads to an address is in range; other operations and factors than drawn only spoil colours. */
static int check(struct job *job)
{
    if (job->size < 1 || job->size > LARGEST_VIEW || job->taps < 1 || job->taps / 2 >= job->size || job->images < 0 ||
        job->views < 0) {
        job->bad = -1;
        return BAD_SIZE;
    }
    for (int64_t i = 0; i < job->images; i++) {
        const int32_t reduction = job->sizes[3 * i + 2];
        int32_t height = job->sizes[3 * i], width = job->sizes[3 * i + 1];
        job->bad = i;
        if (height < 1 || width < 1 || height > LONGEST_SIDE || width > LONGEST_SIDE)
            return BAD_SIZE;
        if (reduction != 1 && (job->paper || (reduction != 2 && reduction != 4 && reduction != 8)))
            return BAD_REDUCTION;
        height *= reduction;
        width *= reduction;
        for (int64_t v = 0; v < job->views; v++) {
            const struct view *view = job->draws + i * job->views + v;
            job->bad = i * job->views + v;
            if (view->top < 0 || view->left < 0 || view->height < 1 || view->width < 1 || view->top > height ||
                view->left > width || view->height > height - view->top || view->width > width - view->left)
                return BAD_BOX;
        }
    }
    return DONE;
}

#ifndef SIMCLR_RAY_DIGEST
#define SIMCLR_RAY_DIGEST 0
#endif

/* Of the source this was built from, as setup.py says; 0 where something else built it. */
EXPORT uint64_t simclr_ray_digest(void)
{
    return SIMCLR_RAY_DIGEST;
}

EXPORT int simclr_ray_make_views(struct job *job)
{
    if (job->version != VERSION)
        return OTHER_VERSION;
    const int wrong = check(job), level = best_level();
    job->level = level < job->level ? level : job->level;
    if (wrong != DONE || job->images == 0 || job->views == 0)
        return wrong;
    const struct most most = measure(job);
    struct work work;
    memset(&work, 0, sizeof work);
    const uint64_t bytes = lay_out(&work, NULL, &most, job->size, job->taps) + 64;
    char *block = bytes <= SIZE_MAX ? malloc((size_t)bytes) : NULL;
    if (!block)
        return NO_MEMORY;
    lay_out(&work, block + (64 - (uintptr_t)block % 64), &most, job->size, job->taps);
#if X86
    if (job->level == AVX512)
        make_avx512(&work, job);
    else if (job->level == AVX2)
        make_avx2(&work, job);
    else
#endif
        make_plain(&work, job);
    PERMIT(block, bytes);
    free(block);
    return DONE;
}
