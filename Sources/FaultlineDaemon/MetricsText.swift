// SPDX-License-Identifier: Apache-2.0

internal import Pager

/// What Prometheus reads (docs/control.md, "Metrics"; its text-based exposition format 0.0.4).
struct MetricsText {
  private(set) var text = ""

  static let contentType = "text/plain; version=0.0.4; charset=utf-8"

  init(
    _ registry: SessionRegistry, images: Int, _ caches: ImageCaches, _ dropped: LogWriter.Dropped
  ) {
    let total = registry.statistics
    let sessions = registry.all
    gauge("faultline_sessions", "Sessions that are served.", sessions.count)
    counter(
      "faultline_handovers_total", "Hand-overs by how they ended.", "result",
      registry.handovers.sorted { $0.key < $1.key }.map { ($0.key, $0.value) })
    counter(
      "faultline_faults_total", "Page faults.", "kind",
      [("missing", total.missingFaults), ("minor", total.minorFaults)])
    counter(
      "faultline_pages_total", "Pages by how they were resolved.", "resolution",
      [
        ("copied", total.copiedPages), ("continued", total.continuedPages),
        ("zero", total.zeroPages), ("failed", total.failedPages),
      ])
    counter(
      "faultline_pages_ahead_total", "Pages that came without a fault of their own.", "reason",
      [("around", total.broughtAlong), ("filled", total.populatedPages)])
    counter(
      "faultline_bytes_total", "Bytes that were copied or mapped, in 4 KiB pages.",
      (total.copiedPages + total.continuedPages) * 4096)
    counter(
      "faultline_faults_deferred_total", "Faults whose page storage did not have at hand.",
      total.deferredFaults)
    counter(
      "faultline_events_total", "Changes of mappings.", "kind",
      [
        ("remove", total.removeEvents), ("unmap", total.unmapEvents),
        ("remap", total.remapEvents), ("fork", total.forkEvents),
      ])
    counter(
      "faultline_retries_total", "Resolutions that an event had to go before.", total.retries)
    gauge(
      "faultline_pending_reads", "Pages that wait for storage.",
      sessions.reduce(0) { $0 + $1.pager.pendingReads })
    let fills = sessions.map(\.pager.fillProgress)
    gauge(
      "faultline_fill_bytes", "Bytes that are to be filled.", fills.reduce(0) { $0 + $1.total })
    gauge(
      "faultline_fill_bytes_done", "Bytes of those that are done.",
      fills.reduce(0) { $0 + $1.done })
    gauge("faultline_images_open", "Images that are open.", images)
    addCaches(caches, clones: sessions.count { $0.cache != nil })
    counter(
      "faultline_log_lines_dropped_total", "Lines of the log that were not written.", "reason",
      [("rate", dropped.rate), ("queue", dropped.queue), ("write", dropped.write)])
    histogram(total.serviceTime)
  }

  private mutating func addCaches(_ caches: ImageCaches, clones: Int) {
    let usage = caches.usage
    gauge("faultline_clones", "Sessions of clones.", clones)
    gauge("faultline_caches", "Images whose clean pages are kept for clones.", usage.count)
    gauge("faultline_cache_bytes", "Clean pages that are kept for clones.", usage.bytes)
    gauge("faultline_cache_limit_bytes", "How many they may be.", caches.budget.limit)
    counter(
      "faultline_cache_evicted_pages_total", "Pages that were taken out to make room.",
      UInt64(caches.budget.evictedPages))
  }

  private mutating func head(_ name: String, _ help: String, _ type: String) {
    text += "# HELP \(name) \(help)\n# TYPE \(name) \(type)\n"
  }

  private mutating func gauge(_ name: String, _ help: String, _ value: Int) {
    head(name, help, "gauge")
    text += "\(name) \(value)\n"
  }

  private mutating func counter(_ name: String, _ help: String, _ value: UInt64) {
    head(name, help, "counter")
    text += "\(name) \(value)\n"
  }

  private mutating func counter(
    _ name: String, _ help: String, _ label: String, _ values: [(String, UInt64)]
  ) {
    head(name, help, "counter")
    for (value, count) in values { text += "\(name){\(label)=\"\(value)\"} \(count)\n" }
  }

  /// Bounds are powers of two of a microsecond, from 2 µs to 8 s.
  private mutating func histogram(_ times: LatencyHistogram) {
    let name = "faultline_fault_seconds"
    head(name, "From reading a fault to having resolved it.", "histogram")
    for exponent in 1...23 {
      let bound = UInt64(1000) << UInt64(exponent)
      text += "\(name)_bucket{le=\"\(Double(bound) / 1e9)\"} \(times.count(below: bound))\n"
    }
    text += "\(name)_bucket{le=\"+Inf\"} \(times.count)\n"
    text += "\(name)_sum \(Double(times.sum) / 1e9)\n\(name)_count \(times.count)\n"
  }
}
