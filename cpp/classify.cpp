// Classifies one raw image with a student that AOTInductor compiled: no server, no Python.
//
//   classify student.aoti.pt2 image.raw      prints the label and its probability
//
// The image is height × width × channels bytes, as the contract in the package says.

#include <fstream>
#include <iomanip>
#include <iostream>
#include <iterator>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

namespace {

std::string read(const std::string& path) {
  std::ifstream stream(path, std::ios::binary);
  if (!stream) throw std::runtime_error(path + ": cannot be read");
  return {std::istreambuf_iterator<char>(stream), {}};
}

std::vector<std::string> lines(const std::string& text) {
  std::vector<std::string> found;
  std::istringstream stream(text);
  for (std::string line; std::getline(stream, line);) found.push_back(line);
  return found;
}

void classify(const std::string& package, const std::string& image) {
  torch::inductor::AOTIModelPackageLoader student(package, "model", /*run_single_threaded=*/true);
  const auto contract = student.get_metadata();
  if (!contract.count("shape") || !contract.count("labels"))
    throw std::runtime_error(package + ": holds no contract; expected a package that compress wrote");
  int64_t channels = 0, height = 0, width = 0;
  std::istringstream(contract.at("shape")) >> channels >> height >> width;
  const auto labels = lines(contract.at("labels"));

  auto bytes = read(image);
  const auto expected = static_cast<size_t>(channels * height * width);
  if (bytes.size() != expected)
    throw std::runtime_error(image + ": expected " + std::to_string(expected) + " bytes, got " +
                             std::to_string(bytes.size()));
  auto pixels = at::from_blob(bytes.data(), {1, height, width, channels}, at::kByte);

  const c10::InferenceMode guard;
  const auto logits = student.run({pixels.permute({0, 3, 1, 2}).contiguous()}).at(0);
  const auto [probability, index] = logits.to(at::kDouble).softmax(1).max(1);
  std::cout << labels.at(index.item<int64_t>()) << ' ' << std::setprecision(17) << probability.item<double>() << '\n';
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::cerr << "usage: classify PACKAGE IMAGE\n";
    return 2;
  }
  try {
    classify(argv[1], argv[2]);
  } catch (const std::exception& error) {
    const std::string text = error.what();
    std::cerr << "error: " << text.substr(0, text.find('\n')) << '\n';
    return 1;
  }
  return 0;
}
