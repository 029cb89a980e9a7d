// Draws samples from a bundle's sampler in C++ with ONNX Runtime: the very files that device/sample.py draws.
//
//     sample BUNDLE/onnx/sampler_8_mixed.onnx OUTPUT_DIR [--num 16] [--seed 0] [--start 0] [--channels 3]
//
// Pictures become PGM (grey), PPM (RGB) or PAM (RGBA), 000000.ppm and so on; all else (voxels, coefficients) NPY.
// --channels cuts off what only fills up to four (`mnif export --pad_channels`).

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <numeric>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include <onnxruntime_cxx_api.h>

using Words = std::vector<std::uint32_t>;
using Wide = unsigned __int128;

// What NumPy's default_rng([seed, index]).standard_normal(n, dtype="float32") draws, number for number. Seed sequence:
// O'Neill, "Developing a seed_seq alternative" (2015). Generator: PCG64, O'Neill, "PCG" (2014). Normal numbers:
// Marsaglia and Tsang, "The Ziggurat Method" (2000), with 256 layers and 23 bits.
class Noise {
 public:
  Noise(std::uint64_t seed, std::uint64_t index) {
    Words entropy = words(seed);
    for (std::uint32_t word : words(index)) entropy.push_back(word);
    const std::array<std::uint64_t, 4> start = seed_sequence(entropy);
    increment_ = (((Wide(start[2]) << 64) | start[3]) << 1) | 1;
    step();
    state_ += (Wide(start[0]) << 64) | start[1];
    step();
  }

  float next() {
    static const Layers layers;
    for (;;) {
      const std::uint32_t bits = next_uint32();
      const std::uint32_t layer = bits & 0xff, steps = bits >> 9;
      const float size = float(steps) * layers.width[layer];
      const float value = bits & 0x100 ? -size : size;
      if (steps < layers.sure[layer]) return value;
      if (layer == 0) return tail(steps & 0x100);
      const float rise = layers.edge[layer - 1] - layers.edge[layer];
      if (rise * uniform() + layers.edge[layer] < std::exp(-0.5 * size * size)) return value;
    }
  }

 private:
  static constexpr double tail_begins = 3.6541528853610088;

  // For each layer its width in units of 2^-23, the numbers that need no second look, and the density at its edge.
  struct Layers {
    std::array<float, 256> width{}, edge{};
    std::array<std::uint32_t, 256> sure{};

    Layers() {
      const double scale = 8388608, area = 0.004928673233974658;
      const auto density = [](double x) { return std::exp(-0.5 * x * x); };
      const double base = area / density(tail_begins);
      width[0] = float(base / scale), width[255] = float(tail_begins / scale);
      sure[0] = std::uint32_t(std::lround(tail_begins / base * scale));
      edge[0] = 1, edge[255] = float(density(tail_begins));
      double outer = tail_begins;
      for (int layer = 254; layer > 0; layer--) {
        const double inner = std::sqrt(-2 * std::log(area / outer + density(outer)));
        sure[layer + 1] = std::uint32_t(std::lround(inner / outer * scale));
        width[layer] = float(inner / scale), edge[layer] = float(density(inner));
        outer = inner;
      }
    }
  };

  // A whole number as 32-bit words, the lowest first; zero is one word.
  static Words words(std::uint64_t number) {
    Words found;
    do found.push_back(std::uint32_t(number));
    while (number >>= 32);
    return found;
  }

  static std::array<std::uint64_t, 4> seed_sequence(const Words& entropy) {
    std::uint32_t constant = 0x43b0d7e5;
    const auto hash = [&](std::uint32_t value) {
      value ^= constant;
      constant *= 0x931e8875;
      value *= constant;
      return value ^ (value >> 16);
    };
    const auto mix = [](std::uint32_t one, std::uint32_t other) {
      const std::uint32_t mixed = 0xca01f9ddu * one - 0x4973f715u * other;
      return mixed ^ (mixed >> 16);
    };
    std::array<std::uint32_t, 4> pool{};
    for (std::size_t place = 0; place < 4; place++) pool[place] = hash(place < entropy.size() ? entropy[place] : 0);
    for (std::size_t from = 0; from < 4; from++)
      for (std::size_t to = 0; to < 4; to++)
        if (from != to) pool[to] = mix(pool[to], hash(pool[from]));
    for (std::size_t from = 4; from < entropy.size(); from++)
      for (std::size_t to = 0; to < 4; to++) pool[to] = mix(pool[to], hash(entropy[from]));
    std::uint32_t out = 0x8b51f9dd;
    std::array<std::uint64_t, 4> state{};
    for (std::size_t place = 0; place < 8; place++) {
      std::uint32_t word = pool[place % 4] ^ out;
      out *= 0x58f38ded;
      word *= out;
      state[place / 2] |= std::uint64_t(word ^ (word >> 16)) << (32 * (place % 2));
    }
    return state;
  }

  void step() {
    const Wide multiplier = (Wide(0x2360ed051fc65da4) << 64) | 0x4385df649fccf645;
    state_ = state_ * multiplier + increment_;
  }

  // Each 64-bit number makes two, the low half first.
  std::uint32_t next_uint32() {
    has_half_ = !has_half_;
    if (!has_half_) return half_;
    step();
    const std::uint64_t folded = std::uint64_t(state_ >> 64) ^ std::uint64_t(state_);
    const unsigned turn = unsigned(state_ >> 122);
    const std::uint64_t number = (folded >> turn) | (folded << ((64 - turn) % 64));
    half_ = std::uint32_t(number >> 32);
    return std::uint32_t(number);
  }

  float uniform() { return float(next_uint32() >> 8) * (1.0f / 16777216.0f); }

  float tail(bool negative) {
    for (;;) {
      const float beyond = -float(1 / tail_begins) * std::log1p(-uniform());
      const float test = -std::log1p(-uniform());
      const float size = float(tail_begins) + beyond;
      if (test + test > beyond * beyond) return negative ? -size : size;
    }
  }

  Wide state_ = 0, increment_ = 0;
  std::uint32_t half_ = 0;
  bool has_half_ = false;
};

struct Options {
  std::filesystem::path graph, output;
  std::uint64_t num = 16, seed = 0, start = 0, channels = 0;
};

std::uint64_t whole_number(const std::string& flag, const std::string& text) {
  if (text.empty() || text.size() > 18 || text.find_first_not_of("0123456789") != std::string::npos)
    throw std::invalid_argument(flag + " " + text + ": a whole number of at most 18 digits is needed");
  return std::stoull(text);
}

Options parse(const std::vector<std::string>& words) {
  Options options;
  std::vector<std::string> paths;
  for (std::size_t at = 0; at < words.size(); at++) {
    if (words[at].rfind("--", 0) != 0) {
      paths.push_back(words[at]);
      continue;
    }
    const std::string flag = words[at];
    if (++at == words.size()) throw std::invalid_argument(flag + ": a number is needed");
    if (flag == "--num") options.num = whole_number(flag, words[at]);
    else if (flag == "--seed") options.seed = whole_number(flag, words[at]);
    else if (flag == "--start") options.start = whole_number(flag, words[at]);
    else if (flag == "--channels") options.channels = whole_number(flag, words[at]);
    else throw std::invalid_argument(flag + ": no such flag; there are --num, --seed, --start, --channels");
  }
  if (paths.size() != 2) throw std::invalid_argument("usage: sample GRAPH.onnx OUTPUT_DIR [--num 16] [--seed 0] …");
  if (options.num == 0) throw std::invalid_argument("--num 0: must be at least 1");
  options.graph = paths[0], options.output = paths[1];
  return options;
}

// Writes under a temporary name, then renames.
void write_file(const std::filesystem::path& path, const std::string& content) {
  std::filesystem::path temporary = path.parent_path() / ("." + path.filename().string() + ".tmp");
  std::ofstream file(temporary, std::ios::binary);
  file.write(content.data(), std::streamsize(content.size()));
  file.close();
  if (!file) throw std::runtime_error(path.string() + ": cannot be written");
  std::filesystem::rename(temporary, path);
}

// Values [height, width, channels] in about [-1, 1] as a picture of the first `kept` channels.
std::string picture(const float* values, const std::vector<std::int64_t>& shape, std::int64_t kept) {
  const std::int64_t height = shape[0], width = shape[1], channels = shape[2];
  std::ostringstream head;
  if (kept == 4)
    head << "P7\nWIDTH " << width << "\nHEIGHT " << height << "\nDEPTH 4\nMAXVAL 255\nTUPLTYPE RGB_ALPHA\nENDHDR\n";
  else
    head << (kept == 1 ? "P5" : "P6") << "\n" << width << " " << height << "\n255\n";
  std::string content = head.str();
  for (std::int64_t pixel = 0; pixel < height * width; pixel++)
    for (std::int64_t channel = 0; channel < kept; channel++) {
      const float clipped = std::clamp(values[pixel * channels + channel], -1.0f, 1.0f);
      content.push_back(char(std::uint8_t(std::nearbyint(clipped * 127.5f + 127.5f))));
    }
  return content;
}

// Float32 values of any shape, as numpy.load reads them.
std::string npy(const float* values, const std::vector<std::int64_t>& shape) {
  std::string header = "{'descr': '<f4', 'fortran_order': False, 'shape': (";
  std::size_t count = 1;
  for (std::int64_t size : shape) header += std::to_string(size) + ", ", count *= std::size_t(size);
  header += "), }";
  header.append((118 - header.size() % 64 + 63) % 64, ' ');  // magic, version and length are 10 bytes, then a newline
  header += "\n";
  std::string content("\x93NUMPY\x01\x00", 8);
  content.push_back(char(header.size() & 0xff)), content.push_back(char(header.size() >> 8));
  return content + header + std::string(reinterpret_cast<const char*>(values), count * sizeof(float));
}

void write_sample(const Options& options, std::uint64_t number, const float* values, std::vector<std::int64_t> shape) {
  char name[32];
  std::snprintf(name, sizeof name, "%06llu", static_cast<unsigned long long>(number));
  const std::int64_t kept = shape.size() == 3 && options.channels ? std::int64_t(options.channels) : shape.back();
  if (shape.size() != 3) return write_file(options.output / (std::string(name) + ".npy"), npy(values, shape));
  if (kept > shape[2] || (kept != 1 && kept != 3 && kept != 4))
    throw std::runtime_error("pictures of 1, 3 or 4 channels are written; values have " + std::to_string(shape[2]));
  const std::string ending = kept == 1 ? ".pgm" : kept == 3 ? ".ppm" : ".pam";
  write_file(options.output / (name + ending), picture(values, shape, kept));
}

void draw(const Options& options) {
  const Ort::Env environment(ORT_LOGGING_LEVEL_ERROR, "sample");
  Ort::Session session(environment, options.graph.c_str(), Ort::SessionOptions());
  const Ort::AllocatorWithDefaultOptions allocator;
  const auto input = session.GetInputNameAllocated(0, allocator);
  const auto output = session.GetOutputNameAllocated(0, allocator);
  const auto noise_shape = session.GetInputTypeInfo(0).GetTensorTypeAndShapeInfo().GetShape();
  if (session.GetInputCount() != 1 || std::string(input.get()) != "noise" || noise_shape.size() != 2)
    throw std::runtime_error(options.graph.string() + ": no sampler, which takes noise [batch, latent_dim]");
  std::filesystem::create_directories(options.output);

  const std::uint64_t most = 16;  // the batches of device/sample.py
  const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  for (std::uint64_t begin = 0; begin < options.num; begin += most) {
    const std::uint64_t size = std::min(most, options.num - begin);
    std::vector<float> noise;
    for (std::uint64_t index = 0; index < size; index++) {
      Noise generator(options.seed, options.start + begin + index);
      for (std::int64_t each = 0; each < noise_shape[1]; each++) noise.push_back(generator.next());
    }
    const std::array<std::int64_t, 2> shape{std::int64_t(size), noise_shape[1]};
    const auto given = Ort::Value::CreateTensor<float>(memory, noise.data(), noise.size(), shape.data(), shape.size());
    const char *takes = input.get(), *gives = output.get();
    const auto results = session.Run(Ort::RunOptions(nullptr), &takes, &given, 1, &gives, 1);
    auto sizes = results[0].GetTensorTypeAndShapeInfo().GetShape();
    sizes.erase(sizes.begin());
    const std::int64_t step = std::accumulate(sizes.begin(), sizes.end(), std::int64_t(1), std::multiplies<>());
    const float* values = results[0].GetTensorData<float>();
    for (std::uint64_t index = 0; index < size; index++)
      write_sample(options, options.start + begin + index, values + std::int64_t(index) * step, sizes);
  }
  std::cout << options.output.string() << ": " << options.num << " drawn\n";
}

int main(int count, char** arguments) {
  try {
    draw(parse(std::vector<std::string>(arguments + 1, arguments + count)));
    return 0;
  } catch (const std::exception& error) {  // ONNX Runtime's among them
    std::string line = error.what();
    std::replace(line.begin(), line.end(), '\n', ' ');
    std::cerr << "sample: " << line << "\n";
    return 2;
  }
}
