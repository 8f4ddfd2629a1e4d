// Light on the solids, the floor and the wall of a drawn scene: `uniworld/data/scenes/shading.py` is the definition.
#pragma once

#include <vector>

#include "scene_solids.h"

namespace uniworld::scene {

enum Material { kMatte = 0, kGlossy, kMetal, kStriped, kDotted };
constexpr double kStripeShare = 0.42, kNudge = 1e-3, kWallFacing = 0.55;

struct Colour {
  double c[3];
};

// The rows of the tables of `solids.py`, and the short vectors of `shading.py`.
struct Thing {
  double colour[3], second[3], material;
  Vec hull;
  double hull_radius, shades_itself;
  Vec stripe;
  double stripe_offset, dot_start, dot_count, shade, scale, solid_start, solid_count;

  int first() const { return static_cast<int>(solid_start); }
  int end() const { return first() + static_cast<int>(solid_count); }
};
struct Foot {
  double thing, x, z, cos, sin, half_x, half_z, rounding, falloff, strength;
};
struct Dot {
  Vec centre;
  double radius2;
};
struct View {
  Vec position, right, up, forward;
  double tangent, wall_z;
};
struct Light {
  Vec towards;
  double sun[3], sky[3], ground, softness;
};
struct Around {
  double floor[3], low[3], high[3], bounce[3], wall_lit, bend;
};
static_assert(sizeof(Thing) == 22 * sizeof(double) && sizeof(Foot) == 10 * sizeof(double));
static_assert(sizeof(View) == 14 * sizeof(double) && sizeof(Light) == 11 * sizeof(double));
static_assert(sizeof(Around) == 14 * sizeof(double) && sizeof(Dot) == 4 * sizeof(double));

template <typename T>
struct Rows {
  const T* data;
  int count;
  const T* begin() const { return data; }
  const T* end() const { return data + count; }
  const T& operator[](int i) const { return data[i]; }
};

struct Tables {
  Rows<Solid> solids;
  Rows<Thing> things;
  Rows<Foot> feet;
  const Dot* dots;
  const Plane* planes;
};

inline double power(double x, int doublings) {
  for (int i = 0; i < doublings; ++i) x = x * x;
  return x;
}

inline double clamp01(double x) { return std::min(std::max(x, 0.0), 1.0); }

inline Vec reflect(Vec direction, Vec normal) { return direction - (2.0 * dot(direction, normal)) * normal; }

// Distance to the floor or to the wall behind it.
inline double backdrop_hit(const View& view, Vec direction, bool* on_floor) {
  const double to_floor = direction.y < 0.0 ? -view.position.y / direction.y : kInfinity;
  const double to_wall = (view.wall_z - view.position.z) / direction.z;
  *on_floor = to_floor < to_wall;
  return std::min(to_floor, to_wall);
}

// Rays to points of the sun's disc, in the own space of every solid.
struct SunRays {
  int count;
  std::vector<Vec> own;

  SunRays(Rows<Vec> rays, Rows<Solid> solids) : count(rays.count) {
    own.reserve(static_cast<size_t>(count) * solids.count);
    for (const Solid& solid : solids)
      for (const Vec& ray : rays) own.push_back(solid.to_own(ray));
  }
};

class Shader {
 public:
  Shader(const Tables& tables, const Light& light, const Around& around, Rows<Vec> floor_rays, Rows<Vec> solid_rays)
      : tables_(tables),
        light_(light),
        around_(around),
        floor_rays_(floor_rays, tables.solids),
        solid_rays_(solid_rays, tables.solids) {}

  Colour backdrop(const View& view, Vec direction, const float* albedo) const {
    bool on_floor;
    const double t = backdrop_hit(view, direction, &on_floor);
    const Vec point = view.position + t * direction;
    double shade = 1.0;
    for (const Foot& foot : tables_.feet) shade = shade * foot_shade(foot, point);
    const double lit = on_floor || around_.wall_lit > 0.0 ? lit_share(floor_rays_, point, -1) : 1.0;
    const double upright = around_.bend > 0.0 ? std::min(point.y / around_.bend, 1.0) : 1.0;
    const double facing = light_.towards.y + (kWallFacing - light_.towards.y) * upright;
    const double sun = on_floor ? light_.towards.y * lit * (0.35 + 0.65 * shade) : facing * lit;
    const double ambient = on_floor ? shade : 1.0;
    Colour out;
    for (int i = 0; i < 3; ++i)
      out.c[i] = static_cast<double>(albedo[i]) * (light_.sky[i] * ambient + light_.sun[i] * sun);
    return out;
  }

  Colour solid(int k, Vec point, Vec direction) const {
    const Solid& solid = tables_.solids[k];
    const int t = solid.owner();
    const Thing& thing = tables_.things[t];
    const int material = static_cast<int>(thing.material);
    const Vec normal = normal_at(solid, tables_.planes, point);
    const double* tones = second_tone(thing, material, point) ? thing.second : thing.colour;
    const double slope = std::max(dot(normal, light_.towards), 0.0);
    const Vec start = point + kNudge * normal;
    const double lit = slope > 0.0 ? lit_share(solid_rays_, start, thing.shades_itself > 0.0 ? -1 : t) : 0.0;
    const double open = openness(t, point, normal), upward = 0.5 + 0.5 * normal.y, sun = slope * lit;
    Colour base, out;
    for (int i = 0; i < 3; ++i) {
      base.c[i] = tones[i] * solid.tone;
      const double ambient = light_.sky[i] * upward + around_.bounce[i] * (1.0 - upward);
      out.c[i] = base.c[i] * (light_.sun[i] * sun + ambient * open);
    }
    if (material != kMatte) add_shine(material, t, base, normal, start, direction, lit, &out);
    return out;
  }

 private:
  // The share of the sun's disc that a point sees; `skip` is the thing whose shade does not count, or -1.
  double lit_share(const SunRays& rays, Vec point, int skip) const {
    const double spread = light_.softness * 1.05;
    const auto near = [&](Vec centre, double radius) { return near_ray(centre, radius, spread, point, light_.towards); };
    uint64_t blocked = 0;
    for (int t = 0; t < tables_.things.count; ++t) {
      const Thing& thing = tables_.things[t];
      if (t == skip || !near(thing.hull, thing.hull_radius)) continue;
      for (int i = thing.first(); i < thing.end(); ++i) {
        const Solid& solid = tables_.solids[i];
        if (!near(solid.ball, solid.ball_radius)) continue;
        const Vec* own = &rays.own[static_cast<size_t>(i) * rays.count];
        blocked |= blocked_by(solid, tables_.planes, solid.to_own(point - solid.centre), own, rays.count);
      }
    }
    return 1.0 - static_cast<double>(__builtin_popcountll(blocked)) / static_cast<double>(rays.count);
  }

  static double foot_shade(const Foot& foot, Vec point) {
    if (!(point.y < 1e-6)) return 1.0;
    const double x = point.x - foot.x, z = point.z - foot.z;
    const double across = std::max(std::abs(x * foot.cos - z * foot.sin) - foot.half_x, 0.0);
    const double along = std::max(std::abs(x * foot.sin + z * foot.cos) - foot.half_z, 0.0);
    const double distance = std::max(std::sqrt(across * across + along * along) - foot.rounding, 0.0);
    const double near = std::max(1.0 - distance / foot.falloff, 0.0);
    return 1.0 - foot.strength * (near * near);
  }

  bool second_tone(const Thing& thing, int material, Vec point) const {
    if (material == kStriped) {
      const double v = dot(thing.stripe, point) + thing.stripe_offset;
      return v - std::floor(v) < kStripeShare;
    }
    if (material != kDotted) return false;
    const Dot* first = tables_.dots + static_cast<int>(thing.dot_start);
    return std::any_of(first, first + static_cast<int>(thing.dot_count), [&](const Dot& spot) {
      const Vec m = point - spot.centre;
      return dot(m, m) < spot.radius2;
    });
  }

  // Ambient light that the floor and the other things leave.
  double openness(int t, Vec point, Vec normal) const {
    const double height = clamp01(point.y / (0.9 * tables_.things[t].scale));
    const double low = 1.0 - height, down = 0.5 - 0.5 * normal.y;
    double left = 1.0 - 0.6 * down * (low * low);
    for (int j = 0; j < tables_.things.count; ++j) {
      if (j == t) continue;
      const Thing& other = tables_.things[j];
      const Vec m = other.hull - point;
      const double distance = std::sqrt(dot(m, m));
      const double fade = clamp01((3.0 * other.shade - distance) / (1.8 * other.shade));
      const double facing = std::max(0.2 + 0.8 * (dot(normal, m) / distance), 0.0);
      left = left * (1.0 - 0.45 * (facing * (fade * fade)));
    }
    return left;
  }

  void add_shine(int material, int t, const Colour& base, Vec normal, Vec start, Vec direction, double lit,
                 Colour* out) const {
    const double glint = std::max(dot(normal, unit(light_.towards - direction)), 0.0);
    if (material == kGlossy) {
      const Colour mirrored = surroundings(reflect(direction, normal));
      const double edge = 1.0 - std::max(-dot(normal, direction), 0.0);
      const double fresnel = 0.04 + 0.5 * (edge * edge * edge * edge * edge);
      const double shine = 0.75 * power(glint, 6) * lit;
      for (int i = 0; i < 3; ++i) out->c[i] = out->c[i] + (light_.sun[i] * shine + fresnel * mirrored.c[i]);
    } else if (material == kMetal) {
      const Colour mirrored = mirror(t, start, reflect(direction, normal));
      const double grey = 0.3 * mirrored.c[0] + 0.5 * mirrored.c[1] + 0.2 * mirrored.c[2];
      const double shine = 0.5 * power(glint, 5) * lit;
      for (int i = 0; i < 3; ++i) {
        const double image = (0.03 + 1.05 * base.c[i]) * (0.7 * grey + 0.3 * mirrored.c[i]);
        out->c[i] = 0.33 * out->c[i] + image + light_.sun[i] * shine;
      }
    } else {
      const double shine = 0.16 * power(glint, 5) * lit;
      for (int i = 0; i < 3; ++i) out->c[i] = out->c[i] + light_.sun[i] * shine;
    }
  }

  // What a mirror shows of the world without things.
  Colour surroundings(Vec d) const {
    const double above = clamp01((d.y + 0.12) / 0.24), high = clamp01(1.4 * d.y);
    const double glow = 0.8 * power(std::max(dot(d, light_.towards), 0.0), 4);
    Colour out;
    for (int i = 0; i < 3; ++i)
      out.c[i] = around_.floor[i] * (1.0 - above) +
                 (around_.low[i] + (around_.high[i] - around_.low[i]) * high) * above + light_.sun[i] * glow;
    return out;
  }

  // What a metal thing shows: its surroundings with more contrast and a dark horizon, and the other things in plain
  // shading.
  Colour mirror(int t, Vec start, Vec d) const {
    double best = kInfinity;
    const Solid* seen = nullptr;
    for (int j = 0; j < tables_.things.count; ++j) {
      const Thing& other = tables_.things[j];
      if (j == t || !near_ray(other.hull, other.hull_radius, 0.0, start, d)) continue;
      for (int i = other.first(); i < other.end(); ++i) {
        const Solid& solid = tables_.solids[i];
        if (!near_ray(solid.ball, solid.ball_radius, 0.0, start, d)) continue;
        const double distance = hit(solid, tables_.planes, start, d);
        if (distance < best) {
          best = distance;
          seen = &solid;
        }
      }
    }
    if (seen == nullptr) {
      const double contrast = 0.75 + 0.75 * clamp01((d.y + 0.1) / 0.5);
      const double dark = contrast * (1.0 - 0.7 * std::max(1.0 - std::abs(d.y + 0.06) / 0.26, 0.0));
      const double strip = 0.9 * std::max(1.0 - std::abs(d.x - 0.7 * light_.towards.x) / 0.2, 0.0);
      Colour world = surroundings(d);
      for (int i = 0; i < 3; ++i) world.c[i] = dark * world.c[i] + light_.sun[i] * strip;
      return world;
    }
    const Vec normal = normal_at(*seen, tables_.planes, start + best * d);
    const double slope = std::max(dot(normal, light_.towards), 0.0);
    const Thing& thing = tables_.things[seen->owner()];
    Colour out;
    for (int i = 0; i < 3; ++i)
      out.c[i] = thing.colour[i] * seen->tone * (0.8 * light_.sky[i] + 0.75 * light_.sun[i] * slope);
    return out;
  }

  const Tables& tables_;
  const Light& light_;
  const Around& around_;
  SunRays floor_rays_, solid_rays_;
};

}  // namespace uniworld::scene
