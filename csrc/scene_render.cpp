// Draws a still life: `uniworld/data/scenes/shading.py` is the definition, and this gives the same bytes.
// One thread: a 128x128 picture takes a few milliseconds, and data loaders run one process a core.
#include <vector>

#include "core.h"
#include "scene_shader.h"

namespace uniworld {
namespace {

using namespace scene;

// The nearest solid of each point of a grid of n x n points. `rays` are their unit directions.
struct Nearest {
  int n;
  std::vector<double> distance;
  std::vector<int16_t> which;

  // `on_hit(thing, index)` is called for every solid that a point's ray meets, hidden or not.
  template <typename OnHit>
  Nearest(const Tables& tables, const View& view, const Vec* rays, int n, OnHit on_hit)
      : n(n), distance(static_cast<size_t>(n) * n, kInfinity), which(static_cast<size_t>(n) * n, -1) {
    for (int k = 0; k < tables.solids.count; ++k) {
      const Solid& solid = tables.solids[k];
      const Vec o = solid.to_own(view.position - solid.centre);
      const int y_end = std::min(static_cast<int>((solid.bottom * 0.5 + 0.5) * n) + 2, n);
      const int x_end = std::min(static_cast<int>((solid.right * 0.5 + 0.5) * n) + 2, n);
      const int x_begin = std::max(static_cast<int>((solid.left * 0.5 + 0.5) * n) - 1, 0);
      for (int y = std::max(static_cast<int>((solid.top * 0.5 + 0.5) * n) - 1, 0); y < y_end; ++y) {
        for (int x = x_begin; x < x_end; ++x) {
          const size_t i = static_cast<size_t>(y) * n + x;
          const double t = hit_own(solid, tables.planes, o, solid.to_own(rays[i]));
          if (t == kInfinity) continue;
          on_hit(solid.owner(), i);
          if (t < distance[i]) {
            distance[i] = t;
            which[i] = static_cast<int16_t>(k);
          }
        }
      }
    }
  }
};

// A table of Python: its address and how many rows it has.
using Table = std::pair<uintptr_t, int>;

template <typename T>
Rows<T> rows(const Table& table) {
  return {pointer<const T>(table.first), table.second};
}

Tables read_tables(const Table& solids, const Table& things, const Table& feet, uintptr_t dots, uintptr_t planes) {
  return {rows<Solid>(solids), rows<Thing>(things), rows<Foot>(feet), pointer<const Dot>(dots),
          pointer<const Plane>(planes)};
}

// Writes uint8 [size, size, 3] to `out`. The view's rays are unit directions through every
// quarter of a pixel and every pixel.
void scene_picture(Table solids, Table things, Table feet, uintptr_t dots, uintptr_t planes, uintptr_t view_row,
                   uintptr_t quarter_rays, uintptr_t centre_rays, uintptr_t light, Table floor_rays, Table solid_rays, uintptr_t around, uintptr_t albedo,
                   Table srgb, int size, uintptr_t out) {
  const Tables tables = read_tables(solids, things, feet, dots, planes);
  const View& view = *pointer<const View>(view_row);
  const Shader shader(tables, *pointer<const Light>(light), *pointer<const Around>(around), rows<Vec>(floor_rays),
                      rows<Vec>(solid_rays));
  const Vec *quarters = pointer<const Vec>(quarter_rays), *centres = pointer<const Vec>(centre_rays);
  const Nearest nearest(tables, view, quarters, 2 * size, [](int, size_t) {});
  const uint8_t* table = pointer<const uint8_t>(srgb.first);
  const double steps = srgb.second - 1;
  const float* base = pointer<const float>(albedo);
  uint8_t* bytes = pointer<uint8_t>(out);
  for (int y = 0; y < size; ++y) {
    for (int x = 0; x < size; ++x, base += 3) {
      Colour sum{}, behind{};
      bool has_behind = false;
      for (int q = 0; q < 4; ++q) {
        const int sub_x = 2 * x + q % 2, sub_y = 2 * y + q / 2;
        const size_t i = static_cast<size_t>(sub_y) * nearest.n + sub_x;
        Colour seen;
        if (nearest.which[i] >= 0) {
          seen = shader.solid(nearest.which[i], view.position + nearest.distance[i] * quarters[i], quarters[i]);
        } else {
          if (!has_behind) behind = shader.backdrop(view, centres[static_cast<size_t>(y) * size + x], base);
          has_behind = true;
          seen = behind;
        }
        for (int i = 0; i < 3; ++i) sum.c[i] = q ? sum.c[i] + std::min(seen.c[i], 1.0) : std::min(seen.c[i], 1.0);
      }
      for (double c : sum.c) *bytes++ = table[static_cast<int>(std::floor(0.25 * c * steps + 0.5))];
    }
  }
}

// At pixel centres: ids uint8 [size, size], depth float32 [size, size], normals float32 [size, size, 3], and int64
// [things], the pixels that each would cover alone.
void scene_geometry(Table solids, Table things, Table feet, uintptr_t dots, uintptr_t planes, uintptr_t view_row,
                    uintptr_t centre_rays, int size, uintptr_t ids_out, uintptr_t depth_out, uintptr_t normal_out, uintptr_t covered_out) {
  const Tables tables = read_tables(solids, things, feet, dots, planes);
  const View& view = *pointer<const View>(view_row);
  const size_t num_pixels = static_cast<size_t>(size) * size;
  std::vector<uint8_t> met(num_pixels * tables.things.count);
  const Vec* centres = pointer<const Vec>(centre_rays);
  const Nearest nearest(tables, view, centres, size, [&](int thing, size_t i) { met[thing * num_pixels + i] = 1; });
  uint8_t* ids = pointer<uint8_t>(ids_out);
  float* depth = pointer<float>(depth_out);
  float* normals = pointer<float>(normal_out);
  int64_t* covered = pointer<int64_t>(covered_out);
  for (int t = 0; t < tables.things.count; ++t)
    covered[t] = std::count(met.begin() + t * num_pixels, met.begin() + (t + 1) * num_pixels, 1);
  for (size_t i = 0; i < num_pixels; ++i, normals += 3) {
    const Vec ray = centres[i];
    const int k = nearest.which[i];
    bool on_floor;
    const double t = k >= 0 ? nearest.distance[i] : backdrop_hit(view, ray, &on_floor);
    const Vec normal = k >= 0     ? normal_at(tables.solids[k], tables.planes, view.position + t * ray)
                       : on_floor ? Vec{0.0, 1.0, 0.0}
                                  : Vec{0.0, 0.0, -1.0};
    ids[i] = k >= 0 ? static_cast<uint8_t>(tables.solids[k].owner() + 1) : 0;
    depth[i] = static_cast<float>(t * dot(ray, view.forward));
    normals[0] = static_cast<float>(dot(normal, view.right));
    normals[1] = static_cast<float>(-dot(normal, view.up));
    normals[2] = static_cast<float>(dot(normal, view.forward));
  }
}

}  // namespace

void bind_scene_render(pybind11::module_& m) {
  m.def("scene_picture", &scene_picture, pybind11::call_guard<pybind11::gil_scoped_release>());
  m.def("scene_geometry", &scene_geometry, pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace uniworld
