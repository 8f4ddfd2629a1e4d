// Rays against the solids of a drawn scene. `uniworld/data/scenes/tracing.py` is the definition: the same operations in
// the same order, only + - * / and square roots of doubles, so that pictures have the same bytes either way.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

// A fused multiply-add would round differently.
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

namespace uniworld::scene {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kEpsilon = 1e-9;
constexpr int kMarchSteps = 64;
constexpr double kMarchHit = 1e-6, kMarchNear = 1e-3;

struct Vec {
  double x, y, z;
};
inline Vec operator+(Vec a, Vec b) { return {a.x + b.x, a.y + b.y, a.z + b.z}; }
inline Vec operator-(Vec a, Vec b) { return {a.x - b.x, a.y - b.y, a.z - b.z}; }
inline Vec operator*(double k, Vec a) { return {k * a.x, k * a.y, k * a.z}; }
inline double dot(Vec a, Vec b) { return a.x * b.x + a.y * b.y + a.z * b.z; }
inline Vec unit(Vec a) {
  const double length = std::sqrt(dot(a, a));
  return {a.x / length, a.y / length, a.z / length};
}

enum Kind { kEllipsoid = 0, kPlanes, kCylinder, kCone, kTorus };

struct Plane {
  Vec normal;
  double offset;
};

// One row of the table of solids; the columns are named in `solids.py`.
struct Solid {
  double kind, thing;
  Vec centre, axis_x, axis_y, axis_z, dims, ball;
  double ball_radius, left, right, top, bottom, tone, plane_start, plane_count;

  Vec to_axes(Vec v) const { return {dot(axis_x, v), dot(axis_y, v), dot(axis_z, v)}; }
  Vec from_axes(Vec v) const {
    return {axis_x.x * v.x + axis_y.x * v.y + axis_z.x * v.z, axis_x.y * v.x + axis_y.y * v.y + axis_z.y * v.z,
            axis_x.z * v.x + axis_y.z * v.y + axis_z.z * v.z};
  }
  // A direction in the space where `hit_own` works: the solid's axes, in which an ellipsoid is the unit ball.
  Vec to_own(Vec v) const {
    const Vec p = to_axes(v);
    return kind == kEllipsoid ? Vec{p.x / dims.x, p.y / dims.y, p.z / dims.z} : p;
  }
  int owner() const { return static_cast<int>(thing); }
};
static_assert(sizeof(Solid) == 28 * sizeof(double));

inline double hit_ellipsoid(Vec o, Vec d) {
  const double a = dot(d, d), b = dot(o, d), c = dot(o, o) - 1.0;
  const double disc = b * b - a * c;
  if (!(disc >= 0.0)) return kInfinity;
  const double t = (-b - std::sqrt(disc)) / a;
  return t > kEpsilon ? t : kInfinity;
}

inline double hit_planes(const Plane* planes, int count, Vec o, Vec d) {
  double near = -kInfinity, far = kInfinity;
  for (int i = 0; i < count; ++i) {
    const double slope = dot(planes[i].normal, d), room = planes[i].offset - dot(planes[i].normal, o);
    if (slope == 0.0) {
      if (room < 0.0) return kInfinity;
      continue;
    }
    const double t = room / slope;
    if (slope < 0.0 && t > near) near = t;
    if (slope > 0.0 && t < far) far = t;
  }
  return near <= far && near > kEpsilon ? near : kInfinity;
}

inline double hit_cylinder(const Solid& s, Vec o, Vec d) {
  const double radius = s.dims.x, half = s.dims.y;
  const double a = d.x * d.x + d.z * d.z, b = o.x * d.x + o.z * d.z, c = o.x * o.x + o.z * o.z - radius * radius;
  const double disc = b * b - a * c;
  if (!(disc >= 0.0)) return kInfinity;
  double near, far;
  if (a > 1e-14) {
    const double root = std::sqrt(disc);
    near = (-b - root) / a;
    far = (-b + root) / a;
  } else {
    far = c <= 0.0 ? kInfinity : -kInfinity;
    near = -far;
  }
  double enter, leave;
  if (d.y == 0.0) {
    leave = o.y <= half && o.y >= -half ? kInfinity : -kInfinity;
    enter = -leave;
  } else {
    const double low = (-half - o.y) / d.y, high = (half - o.y) / d.y;
    enter = std::min(low, high);
    leave = std::max(low, high);
  }
  near = std::max(near, enter);
  far = std::min(far, leave);
  return near <= far && near > kEpsilon ? near : kInfinity;
}

inline double hit_cone(const Solid& s, Vec o, Vec d) {
  const double radius = s.dims.x, height = s.dims.y;
  const double k = radius / height;
  const double k2 = k * k, down = height - o.y;
  double best = kInfinity;
  const double a = d.x * d.x + d.z * d.z - k2 * (d.y * d.y);
  const double b = o.x * d.x + o.z * d.z + k2 * (down * d.y);
  const double c = o.x * o.x + o.z * o.z - k2 * (down * down);
  const double disc = b * b - a * c;
  if (disc >= 0.0) {
    const double root = std::sqrt(disc), safe_a = a == 0.0 ? 1e-30 : a;
    for (const double t : {(-b - root) / safe_a, (-b + root) / safe_a}) {
      const double y = o.y + t * d.y;
      if (t > kEpsilon && y >= 0.0 && y <= height && t < best) best = t;
    }
  }
  const double t = -o.y / (d.y == 0.0 ? 1e-30 : d.y);
  const double x = o.x + t * d.x, z = o.z + t * d.z;
  if (t > kEpsilon && x * x + z * z <= radius * radius && t < best) best = t;
  return best;
}

inline double hit_torus(const Solid& s, Vec o, Vec d) {
  const double reach = s.dims.x + s.dims.y;
  const double b = dot(o, d), c = dot(o, o) - reach * reach;
  const double disc = b * b - c;
  if (!(disc >= 0.0)) return kInfinity;
  const double root = std::sqrt(disc);
  double t = std::max(-b - root, 0.0);
  const double end = -b + root;
  if (!(end > 0.0)) return kInfinity;
  for (int step = 0; step < kMarchSteps; ++step) {
    const Vec p = o + t * d;
    const double q = std::sqrt(p.x * p.x + p.y * p.y) - s.dims.x;
    const double distance = std::sqrt(q * q + p.z * p.z) - s.dims.y;
    if (distance < (step < kMarchSteps - 1 ? kMarchHit : kMarchNear)) return t;
    t = t + distance;
    if (!(t <= end)) return kInfinity;
  }
  return kInfinity;
}

// Distance along a unit ray, both given by `to_own`.
inline double hit_own(const Solid& s, const Plane* planes, Vec o, Vec d) {
  switch (static_cast<int>(s.kind)) {
    case kEllipsoid: return hit_ellipsoid(o, d);
    case kPlanes: return hit_planes(planes + static_cast<int>(s.plane_start), static_cast<int>(s.plane_count), o, d);
    case kCylinder: return hit_cylinder(s, o, d);
    case kCone: return hit_cone(s, o, d);
    default: return hit_torus(s, o, d);
  }
}

// Whether a ray from outside meets the torus. Along the ray, from its point nearest to the middle, the torus is the
// quartic x^4 + p x^2 + q x + r; Sturm's theorem counts its roots between two ends without looking for them.
inline bool blocks_torus(const Solid& s, Vec o, Vec d) {
  const double major2 = s.dims.x * s.dims.x, reach = s.dims.x + s.dims.y;
  const double along = dot(o, d), disc = along * along - (dot(o, o) - reach * reach);
  if (!(disc >= 0.0)) return false;
  const double high = std::sqrt(disc), low = std::max(along, -high);
  if (!(low < high)) return false;
  const Vec m = o - along * d;
  const double h = dot(m, m) + major2 - s.dims.y * s.dims.y;
  const double p = 2.0 * h - 4.0 * major2 * (d.x * d.x + d.y * d.y);
  const double q = -8.0 * major2 * (m.x * d.x + m.y * d.y);
  const double r = h * h - 4.0 * major2 * (m.x * m.x + m.y * m.y);
  const double a = -0.5 * p, b = -0.75 * q, c = -r;
  const double k = -((0.5 * p) * (a * a) - c * a + b * b), l = -(0.25 * q * (a * a) + b * c);
  const double last = -(a * (l * l) - b * (l * k) + c * (k * k));
  const auto changes = [&](double x) {
    const double values[] = {((x * x + p) * x + q) * x + r, (x * x + 0.5 * p) * x + 0.25 * q, (a * x + b) * x + c,
                             k * x + l, last};
    int count = 0;
    for (int i = 0; i < 4; ++i) count += (values[i] < 0.0) != (values[i + 1] < 0.0);
    return count;
  };
  return changes(low) > changes(high);
}

template <typename Blocks>
inline uint64_t blocked_bits(const Vec* rays, int count, Blocks blocks) {
  uint64_t bits = 0;
  for (int k = 0; k < count; ++k) bits |= static_cast<uint64_t>(blocks(rays[k])) << k;
  return bits;
}

// Which of at most 64 unit rays from outside meet the solid, one bit a ray; origin and rays are given by `to_own`.
inline uint64_t blocked_by(const Solid& s, const Plane* planes, Vec o, const Vec* rays, int count) {
  if (s.kind == kEllipsoid) return blocked_bits(rays, count, [&](Vec d) { return hit_ellipsoid(o, d) < kInfinity; });
  if (s.kind == kTorus) return blocked_bits(rays, count, [&](Vec d) { return blocks_torus(s, o, d); });
  return blocked_bits(rays, count, [&](Vec d) { return hit_own(s, planes, o, d) < kInfinity; });
}

inline double hit(const Solid& s, const Plane* planes, Vec origin, Vec direction) {
  return hit_own(s, planes, s.to_own(origin - s.centre), s.to_own(direction));
}

// The normal of a cylinder's or cone's side, which rises by `slope`, or of the cap.
inline Vec round_normal(Vec p, bool on_side, double slope) {
  if (!on_side) return {0.0, p.y > 1e-7 ? 1.0 : -1.0, 0.0};
  double rho = std::sqrt(p.x * p.x + p.z * p.z);
  if (rho == 0.0) rho = 1.0;
  return unit({p.x / rho, slope, p.z / rho});
}

inline Vec nearest_plane(const Plane* planes, int count, Vec p) {
  double best = -kInfinity;
  Vec normal{0.0, 0.0, 0.0};
  for (int i = 0; i < count; ++i) {
    const double height = dot(planes[i].normal, p) - planes[i].offset;
    if (height > best) {
      best = height;
      normal = planes[i].normal;
    }
  }
  return normal;
}

inline Vec normal_in_axes(const Solid& s, const Plane* planes, Vec p) {
  switch (static_cast<int>(s.kind)) {
    case kEllipsoid:
      return unit({p.x / (s.dims.x * s.dims.x), p.y / (s.dims.y * s.dims.y), p.z / (s.dims.z * s.dims.z)});
    case kPlanes:
      return nearest_plane(planes + static_cast<int>(s.plane_start), static_cast<int>(s.plane_count), p);
    case kCylinder: {
      const double rho = std::sqrt(p.x * p.x + p.z * p.z);
      return round_normal(p, rho - s.dims.x >= std::abs(p.y) - s.dims.y, 0.0);
    }
    case kCone: return round_normal(p, p.y > 1e-7, s.dims.x / s.dims.y);
    default: {
      const double q = std::sqrt(p.x * p.x + p.y * p.y);
      const double k = (q - s.dims.x) / q;
      return unit({p.x * k, p.y * k, p.z});
    }
  }
}

inline Vec normal_at(const Solid& s, const Plane* planes, Vec point) {
  return s.from_axes(normal_in_axes(s, planes, s.to_axes(point - s.centre)));
}

// Whether a ball may touch a cone of rays about `direction` that widens by `spread` a unit.
inline bool near_ray(Vec centre, double radius, double spread, Vec origin, Vec direction) {
  const Vec m = centre - origin;
  const double along = dot(m, direction);
  const double across = dot(m, m) - along * along;
  const double reach = radius + spread * std::max(along + radius, 0.0);
  return along > -radius && across <= reach * reach;
}

}  // namespace uniworld::scene
