// Coordinate networks of one batch, evaluated block by block of points so that nothing but parameters, coordinates,
// values and their gradients ever reaches main memory. The entry points take all fields of a batch at once:
//
//   values          Y = f(W; X)
//   vjp             dW for a given dY (the activations are worked out again rather than stored)
//   second_order    for a direction V in parameter space and a given dY: the gradient by W of <dY, J V>, and J V itself
//   errors          weighted squared error against targets, and its gradient by W, in one pass
//   errors_hvp      the Hessian of that error times a direction V
//
// `vjp` is the backward pass of `values`, and `second_order` that of `vjp`; `errors_hvp` is the backward pass of the
// gradient that `errors` gives: what second-order meta-learning needs.
// Plain C interface, called through ctypes; mnif/models/field_op.py is the other side. GCC or Clang vector extensions
// make it run on any CPU; -march=native picks the widest instructions.

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

namespace {

// Lanes of the widest vectors, and how many of them the registers hold.
#if defined(__AVX512F__)
constexpr int WIDEST = 16;
constexpr int REGISTERS = 32;
#else
constexpr int WIDEST = 8;
constexpr int REGISTERS = 16;
#endif

template <int LANES>
struct Vector;
template <>
struct Vector<8> {
    typedef float Floats __attribute__((vector_size(32), aligned(4), may_alias));
    typedef int32_t Ints __attribute__((vector_size(32), aligned(4), may_alias));
};
template <>
struct Vector<16> {
    typedef float Floats __attribute__((vector_size(64), aligned(4), may_alias));
    typedef int32_t Ints __attribute__((vector_size(64), aligned(4), may_alias));
};

// Whole vectors that begin with a cache line: one that straddles two is read at half the speed.
template <typename T>
struct CacheLines {
    typedef T value_type;
    T* allocate(size_t count) { return (T*)::operator new(count * sizeof(T), std::align_val_t(64)); }
    void deallocate(T* begin, size_t) { ::operator delete(begin, std::align_val_t(64)); }
    bool operator==(const CacheLines&) const { return true; }
};
typedef std::vector<float, CacheLines<float>> Buffer;
typedef std::vector<Buffer> Buffers;

// sin and cos of LANES numbers, both within 2e-7 for |x| up to 1e5: x - n pi in two parts, then a polynomial. The
// coefficients are Chebyshev fits of (sin(r)/r - 1)/r^2 and (cos(r) - 1)/r^2 over |r| <= pi/2.
template <int LANES, bool WITH_COSINE>
inline void sine(typename Vector<LANES>::Floats x, float* s, float* c) {
    using Floats = typename Vector<LANES>::Floats;
    using Ints = typename Vector<LANES>::Ints;
    const Floats shifted = x * 0.318309886f + 12582912.0f;  // the low bits of the sum hold round(x / pi)
    const Floats n = shifted - 12582912.0f;
    const Ints sign = (Ints)shifted << 31;
    Floats r = x - n * 3.1415927410125732f;
    r = r + n * 8.742277657347586e-08f;
    const Floats q = r * r;
    Floats u = q * 2.63479182649462e-06f - 0.0001982275425689295f;
    u = u * q + 0.008333242498338223f;
    u = u * q - 0.1666666567325592f;
    const Floats odd = u * (q * r) + r;
    *(Floats*)s = (Floats)((Ints)odd ^ sign);
    if (WITH_COSINE) {
        Floats v = q * -2.629768403039634e-07f + 2.4774590201559477e-05f;
        v = v * q - 0.0013888651737943292f;
        v = v * q + 0.0416666604578495f;
        v = v * q - 0.5f;
        const Floats even = v * q + 1.0f;
        *(Floats*)c = (Floats)((Ints)even ^ sign);
    }
}

// C[m][:] (+)= sum over k of A(m, k) B[k][:] for ROWS rows of C and COLUMNS vectors of columns, all in registers.
template <int LANES, int COLUMNS, int ROWS>
inline void tile(const float* a, long a_row, long a_inner, const float* b, long b_row, float* c, long c_row, long inner,
                 const float* start, bool add) {
    using Floats = typename Vector<LANES>::Floats;
    Floats sum[ROWS][COLUMNS];
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < COLUMNS; j++) {
            if (add)
                sum[i][j] = *(const Floats*)(c + i * c_row + j * LANES);
            else if (start)
                sum[i][j] = *(const Floats*)(start + j * LANES);
            else
                sum[i][j] = Floats{};
        }
    for (long k = 0; k < inner; k++) {
        Floats right[COLUMNS];
        for (int j = 0; j < COLUMNS; j++) right[j] = *(const Floats*)(b + k * b_row + j * LANES);
        for (int i = 0; i < ROWS; i++) {
            const float left = a[i * a_row + k * a_inner];
            for (int j = 0; j < COLUMNS; j++) sum[i][j] += left * right[j];
        }
    }
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < COLUMNS; j++) *(Floats*)(c + i * c_row + j * LANES) = sum[i][j];
}

template <int LANES, int COLUMNS, int ROWS>
inline void rows_of_tiles(long rows, const float* a, long a_row, long a_inner, const float* b, long b_row, float* c,
                          long c_row, long inner, const float* start, bool add) {
    long m = 0;
    for (; m + ROWS <= rows; m += ROWS)
        tile<LANES, COLUMNS, ROWS>(a + m * a_row, a_row, a_inner, b, b_row, c + m * c_row, c_row, inner, start, add);
    if constexpr (ROWS > 1)
        if (m < rows)
            rows_of_tiles<LANES, COLUMNS, (ROWS > 4 ? 4 : ROWS / 2)>(rows - m, a + m * a_row, a_row, a_inner, b, b_row,
                                                                     c + m * c_row, c_row, inner, start, add);
}

// Rows of C whose sums, next to the columns of B and one number of A, fit into the registers.
template <int COLUMNS>
constexpr int rows_in_registers() {
    constexpr int fitting = (REGISTERS - COLUMNS - 1) / COLUMNS;
    for (int rows : {12, 8, 6, 4, 3, 2})  // divisors of a block of points
        if (rows <= fitting) return rows;
    return 1;
}

// C[rows][columns] = (start or zero or C) + A B; `columns` is a multiple of LANES.
template <int LANES>
void whole_vectors(long rows, long columns, long inner, const float* a, long a_row, long a_inner, const float* b,
                   long b_row, float* c, long c_row, const float* start, bool add) {
    long vectors = columns / LANES;
    auto take = [&]<int COLUMNS>() {
        rows_of_tiles<LANES, COLUMNS, rows_in_registers<COLUMNS>()>(rows, a, a_row, a_inner, b, b_row, c, c_row, inner,
                                                                    start, add);
        vectors -= COLUMNS;
        b += COLUMNS * LANES;
        c += COLUMNS * LANES;
        if (start) start += COLUMNS * LANES;
    };
    while (vectors > 0) {
        if (vectors >= 4 && REGISTERS == 32)
            take.template operator()<4>();
        else if (vectors == 3 || vectors >= 5)
            take.template operator()<3>();
        else if (vectors >= 2)
            take.template operator()<2>();
        else
            take.template operator()<1>();
    }
}

// The same for the columns that `padded` gives.
template <int LANES>
void product(long rows, long columns, long inner, const float* a, long a_row, long a_inner, const float* b, long b_row,
             float* c, long c_row, const float* start = nullptr, bool add = false) {
    if (columns % LANES == 0)
        whole_vectors<LANES>(rows, columns, inner, a, a_row, a_inner, b, b_row, c, c_row, start, add);
    else
        whole_vectors<8>(rows, columns, inner, a, a_row, a_inner, b, b_row, c, c_row, start, add);
}

// Sines (and cosines) of `count` numbers, a multiple of 8, in place.
template <int LANES, bool WITH_COSINE>
void sines(float* x, float* cosine, long count) {
    using Floats = typename Vector<LANES>::Floats;
    using Half = typename Vector<8>::Floats;
    long i = 0;
    for (; i + LANES <= count; i += LANES) sine<LANES, WITH_COSINE>(*(const Floats*)(x + i), x + i, cosine + i);
    for (; i < count; i += 8) sine<8, WITH_COSINE>(*(const Half*)(x + i), x + i, cosine + i);
}

struct Shape {
    int layers;        // linear layers
    const int* sizes;  // layers + 1 numbers: coordinates, hidden units ..., channels
    bool output_sine;
    long parameters;  // numbers in one field's row
};

// Columns that n numbers take: whole vectors, but no more than one short vector for the few channels of values.
inline long padded(long n, int lanes) { return n <= 8 ? 8 : (n + lanes - 1) / lanes * lanes; }

// The weights of one field, columns padded with zeros to whole vectors, and transposed likewise.
struct Weights {
   public:
    Buffers forward, backward, bias;

    void read(const Shape& shape, const float* row, int lanes, bool transposed) {
        prepare(shape, lanes);
        for (int l = 0; l < shape.layers; l++) {
            const long in = shape.sizes[l], out = shape.sizes[l + 1], wide = padded(out, lanes), high = padded(in, lanes);
            for (long k = 0; k < in; k++) std::copy(row + k * out, row + (k + 1) * out, forward[l].data() + k * wide);
            std::copy(row + in * out, row + in * out + out, bias[l].data());
            if (transposed && l > 0)
                for (long j = 0; j < out; j++)
                    for (long k = 0; k < in; k++) backward[l][j * high + k] = row[k * out + j];
            row += (in + 1) * out;
        }
    }

   private:
    std::vector<int> sizes_;
    int lanes_ = 0;

    // Room for a shape, with zeros that stay where columns are padded; kept from field to field.
    void prepare(const Shape& shape, int lanes) {
        const std::vector<int> sizes(shape.sizes, shape.sizes + shape.layers + 1);
        if (sizes == sizes_ && lanes == lanes_) return;
        sizes_ = sizes;
        lanes_ = lanes;
        for (auto* layers : {&forward, &backward, &bias}) layers->assign(shape.layers, {});
        for (int l = 0; l < shape.layers; l++) {
            const long in = sizes[l], out = sizes[l + 1], wide = padded(out, lanes), high = padded(in, lanes);
            forward[l].assign(in * wide, 0.0f);
            bias[l].assign(wide, 0.0f);
            backward[l].assign(out * high, 0.0f);
        }
    }
};

// Sums of dW and db over blocks, padded; written out once per field.
struct Gradients {
    Buffers weight, bias;

    void clear(const Shape& shape, int lanes) {
        weight.resize(shape.layers);
        bias.resize(shape.layers);
        for (int l = 0; l < shape.layers; l++) {
            const long wide = padded(shape.sizes[l + 1], lanes);
            weight[l].assign(shape.sizes[l] * wide, 0.0f);
            bias[l].assign(wide, 0.0f);
        }
    }

    void add_to(const Shape& shape, int lanes, float* row) const {
        for (int l = 0; l < shape.layers; l++) {
            const long in = shape.sizes[l], out = shape.sizes[l + 1], wide = padded(out, lanes);
            for (long k = 0; k < in; k++)
                for (long j = 0; j < out; j++) row[k * out + j] += weight[l][k * wide + j];
            for (long j = 0; j < out; j++) row[in * out + j] += bias[l][j];
            row += (in + 1) * out;
        }
    }
};

// One thread's memory for a block of points: everything between the layers.
struct Workspace {
    Weights weights, direction;
    Gradients gradients;
    Buffers sines, cosines, tangents, tangent_inputs;
    Buffer output, upper_a, upper_e, lower_a, lower_e;
};

Workspace& workspace() {
    static thread_local Workspace space;
    return space;
}

template <int LANES>
class Block {
   public:
    Block(const Shape& shape, Workspace& space) : shape_(shape), space_(space) {
        widest_ = 0;
        for (int l = 1; l <= shape.layers; l++) widest_ = std::max(widest_, padded(shape.sizes[l], LANES));
        points_ = std::max<long>(24, std::min<long>(192, 3072 / widest_ / 24 * 24));
        for (Buffers* buffers : {&space.sines, &space.cosines, &space.tangents, &space.tangent_inputs})
            buffers->resize(shape.layers);
        for (int l = 0; l < shape.layers; l++)
            for (Buffers* buffers : {&space.sines, &space.cosines, &space.tangents, &space.tangent_inputs})
                (*buffers)[l].resize(points_ * widest_);
        for (auto* buffer : {&space.output, &space.upper_a, &space.upper_e, &space.lower_a, &space.lower_e})
            buffer->resize(points_ * widest_);
    }

    long points() const { return points_; }

    // sines[l] (and cosines[l]) of every layer's sums; the last layer's sums stay as they are without an output sine.
    template <bool WITH_COSINE>
    void forward(const float* coordinates, long count) {
        const float* input = coordinates;
        long stride = shape_.sizes[0];
        for (int l = 0; l < shape_.layers; l++) {
            const long wide = width(l);
            float* out = space_.sines[l].data();
            product<LANES>(count, wide, shape_.sizes[l], input, stride, 1, space_.weights.forward[l].data(), wide, out,
                           wide, space_.weights.bias[l].data());
            if (l < shape_.layers - 1 || shape_.output_sine)
                sines<LANES, WITH_COSINE>(out, space_.cosines[l].data(), count * wide);
            input = out;
            stride = wide;
        }
    }

    void copy_values(float* values, long count) const {
        const long channels = shape_.sizes[shape_.layers], wide = width(shape_.layers - 1);
        const float* out = space_.sines[shape_.layers - 1].data();
        for (long p = 0; p < count; p++)
            for (long j = 0; j < channels; j++) values[p * channels + j] = out[p * wide + j];
    }

    // Adds this block's dW to the workspace's gradients, after forward<true>.
    void vjp(const float* coordinates, const float* upstream, long count) {
        read_upstream(upstream, count, space_.upper_a.data());
        pull_back(coordinates, count);
    }

    // The sum over points of weight times mean squared error, and its dW, after forward<true>.
    double errors(const float* coordinates, const float* targets, const float* weights, long count) {
        const double sum = read_residuals(targets, weights, count);
        pull_back(coordinates, count);
        return sum;
    }

    // J V into `values_tangent`, and the gradient by W of <upstream, J V> into the workspace's gradients.
    void second_order(const float* coordinates, const float* upstream, long count, float* values_tangent) {
        const int last = shape_.layers - 1;
        tangent(coordinates, count);
        const long channels = shape_.sizes[shape_.layers], wide = width(last);
        const float* out = output_tangent();
        for (long p = 0; p < count; p++)
            for (long j = 0; j < channels; j++) values_tangent[p * channels + j] = out[p * wide + j];
        read_upstream(upstream, count, space_.upper_a.data());
        std::fill(space_.upper_e.begin(), space_.upper_e.begin() + count * wide, 0.0f);
        pull_back_tangent(coordinates, count);
    }

    // The Hessian of that sum, times V, into the workspace's gradients.
    void errors_hvp(const float* coordinates, const float* targets, const float* weights, long count) {
        tangent(coordinates, count);
        read_residuals(targets, weights, count);
        const long channels = shape_.sizes[shape_.layers], wide = width(shape_.layers - 1);
        const float* out = output_tangent();
        float* e = space_.upper_e.data();
        for (long p = 0; p < count; p++) {
            const float scale = 2 * weights[p] / channels;
            for (long j = 0; j < wide; j++) e[p * wide + j] = out[p * wide + j] * scale;
        }
        pull_back_tangent(coordinates, count);
    }

   private:
    long width(int layer) const { return padded(shape_.sizes[layer + 1], LANES); }

    const float* input(int layer, const float* coordinates) const {
        return layer ? space_.sines[layer - 1].data() : coordinates;
    }

    long input_stride(int layer) const { return layer ? width(layer - 1) : shape_.sizes[0]; }

    void read_upstream(const float* upstream, long count, float* to) const {
        const long channels = shape_.sizes[shape_.layers], wide = width(shape_.layers - 1);
        std::fill(to, to + count * wide, 0.0f);
        for (long p = 0; p < count; p++)
            for (long j = 0; j < channels; j++) to[p * wide + j] = upstream[p * channels + j];
    }

    // The gradient of the weighted error by the values into upper_a; gives the error.
    double read_residuals(const float* targets, const float* weights, long count) {
        const long channels = shape_.sizes[shape_.layers], wide = width(shape_.layers - 1);
        const float* out = space_.sines[shape_.layers - 1].data();
        float* to = space_.upper_a.data();
        std::fill(to, to + count * wide, 0.0f);
        double sum = 0;
        for (long p = 0; p < count; p++) {
            const float scale = 2 * weights[p] / channels;
            for (long j = 0; j < channels; j++) {
                const float residual = out[p * wide + j] - targets[p * channels + j];
                to[p * wide + j] = residual * scale;
                sum += 0.5 * scale * (double)residual * residual;
            }
        }
        return sum;
    }

    const float* output_tangent() const {
        const int last = shape_.layers - 1;
        return shape_.output_sine ? space_.tangent_inputs[last].data() : space_.tangents[last].data();
    }

    // From cotangents of the values in upper_a down to dW.
    void pull_back(const float* coordinates, long count) {
        float *upper = space_.upper_a.data(), *lower = space_.lower_a.data();
        if (shape_.output_sine) multiply(upper, space_.cosines[shape_.layers - 1].data(), count * width(shape_.layers - 1));
        for (int l = shape_.layers - 1; l >= 0; l--) {
            add_gradient(l, input(l, coordinates), input_stride(l), upper, count, true);
            if (l == 0) break;
            pass_down(l, space_.weights, upper, lower, count, false);
            multiply(lower, space_.cosines[l - 1].data(), count * width(l - 1));
            std::swap(upper, lower);
        }
    }

    // From cotangents of the values' tangents in upper_a and of the values in upper_e down to dW. On the way, a belongs
    // to a layer's tangent sums and e to its sums.
    void pull_back_tangent(const float* coordinates, long count) {
        float *a = space_.upper_a.data(), *e = space_.upper_e.data();
        float *lower_a = space_.lower_a.data(), *lower_e = space_.lower_e.data();
        if (shape_.output_sine) through_sine(shape_.layers - 1, a, e, count);
        for (int l = shape_.layers - 1; l >= 0; l--) {
            add_gradient(l, input(l, coordinates), input_stride(l), e, count, true);
            if (l == 0) break;
            add_gradient(l, space_.tangent_inputs[l - 1].data(), width(l - 1), a, count, false);
            pass_down(l, space_.weights, a, lower_a, count, false);
            pass_down(l, space_.weights, e, lower_e, count, false);
            pass_down(l, space_.direction, a, lower_e, count, true);
            through_sine(l - 1, lower_a, lower_e, count);
            std::swap(a, lower_a);
            std::swap(e, lower_e);
        }
    }

    static void multiply(float* x, const float* y, long count) {
        for (long i = 0; i < count; i++) x[i] *= y[i];
    }

    void add_gradient(int layer, const float* in, long stride, const float* cotangent, long count, bool with_bias) {
        const long wide = width(layer);
        product<LANES>(shape_.sizes[layer], wide, count, in, 1, stride, cotangent, wide,
                       space_.gradients.weight[layer].data(), wide, nullptr, true);
        if (!with_bias) return;
        float* bias = space_.gradients.bias[layer].data();
        for (long p = 0; p < count; p++)
            for (long j = 0; j < wide; j++) bias[j] += cotangent[p * wide + j];
    }

    void pass_down(int layer, const Weights& weights, const float* upper, float* lower, long count, bool add) const {
        const long wide = width(layer), below = width(layer - 1);
        product<LANES>(count, below, shape_.sizes[layer + 1], upper, wide, 1, weights.backward[layer].data(), below, lower,
                       below, nullptr, add);
    }

    // tangents[l]: of layer l's sums; tangent_inputs[l]: of its sines.
    void tangent(const float* coordinates, long count) {
        for (int l = 0; l < shape_.layers; l++) {
            const long wide = width(l);
            float* out = space_.tangents[l].data();
            product<LANES>(count, wide, shape_.sizes[l], input(l, coordinates), input_stride(l), 1,
                           space_.direction.forward[l].data(), wide, out, wide, space_.direction.bias[l].data());
            if (l > 0)
                product<LANES>(count, wide, shape_.sizes[l], space_.tangent_inputs[l - 1].data(), width(l - 1), 1,
                               space_.weights.forward[l].data(), wide, out, wide, nullptr, true);
            if (l == shape_.layers - 1 && !shape_.output_sine) break;
            const float* cosine = space_.cosines[l].data();
            float* next = space_.tangent_inputs[l].data();
            for (long i = 0; i < count * wide; i++) next[i] = out[i] * cosine[i];
        }
    }

    // From cotangents of a layer's sines (and their tangents) to those of its sums.
    void through_sine(int layer, float* a, float* e, long count) const {
        const float *s = space_.sines[layer].data(), *c = space_.cosines[layer].data(), *t = space_.tangents[layer].data();
        for (long i = 0; i < count * width(layer); i++) {
            e[i] = e[i] * c[i] - a[i] * s[i] * t[i];
            a[i] *= c[i];
        }
    }

    const Shape& shape_;
    Workspace& space_;
    long points_, widest_;
};

Shape shape_of(int layers, const int* sizes, int output_sine) {
    long parameters = 0;
    for (int l = 0; l < layers; l++) parameters += (long)(sizes[l] + 1) * sizes[l + 1];
    return {layers, sizes, output_sine != 0, parameters};
}

const long CHUNK = 512;  // points a thread takes at a time when there are few fields

template <int LANES>
void values(const Shape& shape, long fields, long points, const float* coordinates, long sets, const float* rows,
            float* out, int threads) {
    const long d = shape.sizes[0], channels = shape.sizes[shape.layers];
    const long parts = fields >= 4 * threads ? 1 : (points + CHUNK - 1) / CHUNK;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (long item = 0; item < fields * parts; item++) {
        const long field = item / parts, part = item % parts;
        const long begin = points * part / parts, end = points * (part + 1) / parts;
        Workspace& space = workspace();
        Block<LANES> block(shape, space);
        space.weights.read(shape, rows + field * shape.parameters, LANES, false);
        for (long p = begin; p < end; p += block.points()) {
            const long count = std::min(block.points(), end - p);
            block.template forward<false>(coordinates + ((field % sets) * points + p) * d, count);
            block.copy_values(out + (field * points + p) * channels, count);
        }
    }
}

// Calls `work` on every block of every field, and writes the gradients it has added up to `gradient`.
template <int LANES, typename WORK>
void gradients(const Shape& shape, long fields, long points, const float* coordinates, long sets, const float* rows,
               const float* direction, float* gradient, int threads, WORK work) {
    const long d = shape.sizes[0];
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (long field = 0; field < fields; field++) {
        Workspace& space = workspace();
        Block<LANES> block(shape, space);
        space.weights.read(shape, rows + field * shape.parameters, LANES, true);
        if (direction) space.direction.read(shape, direction + field * shape.parameters, LANES, true);
        space.gradients.clear(shape, LANES);
        for (long p = 0; p < points; p += block.points()) {
            const long count = std::min(block.points(), points - p);
            const float* at = coordinates + ((field % sets) * points + p) * d;
            block.template forward<true>(at, count);
            work(block, at, field, p, count);
        }
        float* row = gradient + field * shape.parameters;
        std::fill(row, row + shape.parameters, 0.0f);
        space.gradients.add_to(shape, LANES, row);
    }
}

// Eight lanes where sixteen would leave more of the hidden units' vectors empty.
bool narrow(const Shape& shape) {
    const long width = shape.layers > 1 ? shape.sizes[1] : shape.sizes[shape.layers];
    return width > 8 && padded(width, 16) != padded(width, 8);
}

}  // namespace

extern "C" {

void mnif_field_values(int layers, const int* sizes, int output_sine, long fields, long points, const float* coordinates,
                       long sets, const float* rows, float* out, int threads) {
    const Shape shape = shape_of(layers, sizes, output_sine);
    narrow(shape) ? values<8>(shape, fields, points, coordinates, sets, rows, out, threads)
                  : values<WIDEST>(shape, fields, points, coordinates, sets, rows, out, threads);
}

void mnif_field_vjp(int layers, const int* sizes, int output_sine, long fields, long points, const float* coordinates,
                    long sets, const float* rows, const float* upstream, float* gradient, int threads) {
    const Shape shape = shape_of(layers, sizes, output_sine);
    const long channels = sizes[layers];
    auto work = [&](auto& block, const float* at, long field, long p, long count) {
        block.vjp(at, upstream + (field * points + p) * channels, count);
    };
    narrow(shape) ? gradients<8>(shape, fields, points, coordinates, sets, rows, nullptr, gradient, threads, work)
                  : gradients<WIDEST>(shape, fields, points, coordinates, sets, rows, nullptr, gradient, threads, work);
}

void mnif_field_second_order(int layers, const int* sizes, int output_sine, long fields, long points,
                             const float* coordinates, long sets, const float* rows, const float* upstream,
                             const float* direction, float* gradient, float* values_tangent, int threads) {
    const Shape shape = shape_of(layers, sizes, output_sine);
    const long channels = sizes[layers];
    auto work = [&](auto& block, const float* at, long field, long p, long count) {
        const long offset = (field * points + p) * channels;
        block.second_order(at, upstream + offset, count, values_tangent + offset);
    };
    narrow(shape) ? gradients<8>(shape, fields, points, coordinates, sets, rows, direction, gradient, threads, work)
                  : gradients<WIDEST>(shape, fields, points, coordinates, sets, rows, direction, gradient, threads, work);
}

// Field i's point p counts by weights[i modulo weight_sets][p]. `errors` [fields] starts at zero.
void mnif_field_errors(int layers, const int* sizes, int output_sine, long fields, long points, const float* coordinates,
                       long sets, const float* rows, const float* targets, const float* weights, long weight_sets,
                       float* errors, float* gradient, int threads) {
    const Shape shape = shape_of(layers, sizes, output_sine);
    const long channels = sizes[layers];
    auto work = [&](auto& block, const float* at, long field, long p, long count) {
        errors[field] += (float)block.errors(at, targets + (field * points + p) * channels,
                                             weights + (field % weight_sets) * points + p, count);
    };
    narrow(shape) ? gradients<8>(shape, fields, points, coordinates, sets, rows, nullptr, gradient, threads, work)
                  : gradients<WIDEST>(shape, fields, points, coordinates, sets, rows, nullptr, gradient, threads, work);
}

void mnif_field_errors_hvp(int layers, const int* sizes, int output_sine, long fields, long points,
                           const float* coordinates, long sets, const float* rows, const float* targets,
                           const float* weights, long weight_sets, const float* direction, float* gradient,
                           int threads) {
    const Shape shape = shape_of(layers, sizes, output_sine);
    const long channels = sizes[layers];
    auto work = [&](auto& block, const float* at, long field, long p, long count) {
        block.errors_hvp(at, targets + (field * points + p) * channels, weights + (field % weight_sets) * points + p,
                         count);
    };
    narrow(shape) ? gradients<8>(shape, fields, points, coordinates, sets, rows, direction, gradient, threads, work)
                  : gradients<WIDEST>(shape, fields, points, coordinates, sets, rows, direction, gradient, threads, work);
}
}
