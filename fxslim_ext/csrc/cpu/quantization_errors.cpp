// quantization_errors on the CPU.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "../layout.h"
#include "instruction_set.h"

namespace fxslim {
namespace {

struct Grid {
  double first, step;
  int64_t num_points;
};

// What lies below a point x of a bin: below + density * x; and its mean times that: moment + density * x * x / 2.
struct Bin {
  double density, below, moment;
};

// For grids of fewer points than there are bins: two sums at the middles between points give the whole.
class Moments {
 public:
  Moments(const std::vector<double>& edges, const int64_t* counts) : edges_(edges) {
    const int64_t num_bins = edges.size() - 1;
    bins_.reserve(num_bins);
    for (int64_t k = 0; k < num_bins; ++k) {
      const double lower = edges[k], upper = edges[k + 1], count = static_cast<double>(counts[k]);
      const double density = upper > lower ? count / (upper - lower) : 0.0;
      bins_.push_back({density, total_ - density * lower, first_moment_ - density * lower * lower / 2});
      total_ += count;
      first_moment_ += count * ((lower + upper) / 2);
      second_moment_ += count * ((lower * lower + lower * upper + upper * upper) / 3);
    }
    // The first and the last bin may be narrower than the others, which lie evenly.
    width_ = num_bins > 2 ? edges[2] - edges[1] : 0.0;
    for (int64_t k = 1; k + 1 < num_bins; ++k)
      if (edges[k + 1] - edges[k] != width_) width_ = 0.0;
  }

  double error(const Grid& grid) const {
    const double sum = width_ > 0 ? sum_of(grid, [this](double x) FXSLIM_INLINE { return even_bin_of(x); })
                                  : sum_of(grid, [this](double x) FXSLIM_INLINE { return bin_of(x); });
    const double last = grid.first + grid.step * static_cast<double>(grid.num_points - 1);
    const double whole = second_moment_ - 2 * last * first_moment_ + last * last * total_;
    return whole + 2 * grid.step * sum;
  }

 private:
  template <class Find>
  double sum_of(const Grid& grid, const Find& find) const {
    double sum = 0;
    for_best_cpu([&]() FXSLIM_INLINE {
      for (int64_t k = 0; k + 1 < grid.num_points; ++k) {
        const double middle = grid.first + grid.step * (static_cast<double>(k) + 0.5);
        const double inside = std::min(std::max(edges_.front(), middle), edges_.back());
        const Bin& bin = bins_[find(inside)];
        const double below = bin.below + bin.density * inside;
        sum += bin.moment + bin.density * inside * inside / 2 - middle * below;
      }
    });
    return sum;
  }

  FXSLIM_INLINE int64_t in_range(int64_t k) const { return std::clamp<int64_t>(k, 0, bins_.size() - 1); }
  FXSLIM_INLINE int64_t even_bin_of(double x) const {
    return in_range(static_cast<int64_t>(std::floor((x - edges_[1]) / width_ + 1)));
  }
  int64_t bin_of(double x) const {
    return in_range(std::upper_bound(edges_.begin(), edges_.end(), x) - edges_.begin() - 1);
  }

  const std::vector<double>& edges_;
  std::vector<Bin> bins_;
  double total_ = 0, first_moment_ = 0, second_moment_ = 0, width_;
};

// A value's nearest point, and how far it lies above that.
struct Place {
  double point, distance;
  FXSLIM_INLINE Place(double x, const Grid& grid) {
    const double last = static_cast<double>(grid.num_points - 1);
    point = std::min(std::max(std::nearbyint((x - grid.first) / grid.step), 0.0), last);
    distance = x - grid.first - point * grid.step;
  }
};

// For grids of more points than there are bins: the integral within each bin.
double error_of_bins(const std::vector<double>& edges, const int64_t* counts, const Grid& grid) {
  double sum = 0;
  const double step = grid.step;
  for_best_cpu([&]() FXSLIM_INLINE {
    for (size_t k = 0; k + 1 < edges.size(); ++k) {
      if (counts[k] == 0) continue;
      const Place from(edges[k], grid), to(edges[k + 1], grid);
      const double a = from.distance, b = to.distance, width = edges[k + 1] - edges[k];
      // Between two neighbouring points the squared distance integrates to step**3 / 12.
      const double cubes = (b * b * b - a * a * a) / 3 + (to.point - from.point) * (step * step * step / 12);
      // A bin of almost no width that spans the middle between two points has no digits left for a quotient.
      const double across = width > 1e-6 * step ? cubes / width : step * step / 4;
      const double within = (a * a + a * b + b * b) / 3;
      sum += static_cast<double>(counts[k]) * (from.point == to.point ? within : across);
    }
  });
  return sum;
}

Tensor quantization_errors(
    const Tensor& edges, const Tensor& counts, const Tensor& first, const Tensor& step, int64_t num_points) {
  const int64_t num_bins = counts.numel(), num_grids = first.numel();
  STD_TORCH_CHECK(num_bins > 0 && num_points > 0, "there must be bins, and points");
  check_parameters("edges", edges, counts, num_bins + 1, ScalarType::Double);
  check_parameters("counts", counts, edges, num_bins, ScalarType::Long);
  check_parameters("first", first, edges, num_grids, ScalarType::Double);
  check_parameters("step", step, edges, num_grids, ScalarType::Double);
  Tensor errors = empty_vector(first, num_grids, ScalarType::Double);
  const Tensor inputs[4] = {
      torch::stable::contiguous(edges), torch::stable::contiguous(counts), torch::stable::contiguous(first),
      torch::stable::contiguous(step)};
  const auto* edge = static_cast<const double*>(inputs[0].const_data_ptr());
  const auto* count = static_cast<const int64_t*>(inputs[1].const_data_ptr());
  const auto* from = static_cast<const double*>(inputs[2].const_data_ptr());
  const auto* steps = static_cast<const double*>(inputs[3].const_data_ptr());
  auto* result = static_cast<double*>(errors.mutable_data_ptr());

  // Around 0, so that no digits are lost where the data lies far away from it.
  const double centre = (edge[0] + edge[num_bins]) / 2;
  std::vector<double> centred(edge, edge + num_bins + 1);
  for (double& x : centred) x -= centre;
  const bool by_points = num_points < num_bins;
  const Moments moments(centred, count);
  const int64_t grain = 1 + (int64_t(1) << 15) / std::min(num_points, num_bins);
  torch::stable::parallel_for(0, num_grids, grain, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const Grid grid{from[c] - centre, steps[c], num_points};
      result[c] = by_points ? moments.error(grid) : error_of_bins(centred, count, grid);
    }
  });
  return errors;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fxslim, CPU, m) { m.impl("quantization_errors", TORCH_BOX(&quantization_errors)); }

}  // namespace fxslim
