// SPDX-License-Identifier: Apache-2.0

import Snapshot

/// What `faultline snapshot` tells about one image; times in nanoseconds.
struct SnapshotResult: Encodable {
  let image: String
  let guest: String
  let memoryBytes: Int
  let filled: SnapshotSubject.Filled
  let isLive: Bool
  let isIncremental: Bool
  /// How writes were found; `nil` when nothing was tracked.
  let tracking: String?
  let imageBytes: Int
  let report: SnapshotReport
  /// 4 KiB pages that the guest wrote in a second, before and during a live snapshot.
  let pagesPerSecondBefore: Double?
  let pagesPerSecondDuring: Double?

  private enum Key: String, CodingKey {
    case image, guest, memoryBytes, filledPages, fillNanoseconds, live, incremental, tracking,
      imageBytes, snapshotNanoseconds
    case pauseNanoseconds, stoppingNanoseconds, savingStateNanoseconds, trackingNanoseconds
    case copyingNanoseconds, resumingNanoseconds, armingNanoseconds, pages, pagesCopiedFirst
    case stalls, pagesPerSecondBefore, pagesPerSecondDuring
  }

  func encode(to encoder: any Encoder) throws {
    var values = encoder.container(keyedBy: Key.self)
    try values.encode(image, forKey: .image)
    try values.encode(guest, forKey: .guest)
    try values.encode(memoryBytes, forKey: .memoryBytes)
    try values.encode(filled.pages, forKey: .filledPages)
    try values.encode(filled.nanoseconds, forKey: .fillNanoseconds)
    try values.encode(isLive, forKey: .live)
    try values.encode(isIncremental, forKey: .incremental)
    try values.encode(tracking, forKey: .tracking)
    try values.encode(imageBytes, forKey: .imageBytes)
    try values.encode(report.duration, forKey: .snapshotNanoseconds)
    try values.encode(report.pause.total, forKey: .pauseNanoseconds)
    try values.encode(report.pause.stopping, forKey: .stoppingNanoseconds)
    try values.encode(report.pause.savingState, forKey: .savingStateNanoseconds)
    try values.encode(report.pause.tracking, forKey: .trackingNanoseconds)
    try values.encode(report.pause.copying, forKey: .copyingNanoseconds)
    try values.encode(report.pause.resuming, forKey: .resumingNanoseconds)
    try values.encode(report.arming, forKey: .armingNanoseconds)
    try values.encode(report.pages, forKey: .pages)
    try values.encode(report.copiedFirst, forKey: .pagesCopiedFirst)
    try values.encode(report.stalls, forKey: .stalls)
    try values.encode(pagesPerSecondBefore, forKey: .pagesPerSecondBefore)
    try values.encode(pagesPerSecondDuring, forKey: .pagesPerSecondDuring)
  }

  // MARK: - For people

  func show(_ number: Int) {
    if number == 0 {
      print(
        "\(Terminal.size(memoryBytes)) \(guest == "kvm" ? "KVM" : "process") guest, "
          + "\(filled.pages) pages filled in \(Terminal.duration(filled.nanoseconds))")
    }
    let kind = (isLive ? "live " : "") + (isIncremental ? "incremental " : "")
    print(
      "\(image): \(kind)\(report.pages) pages saved in \(Terminal.duration(report.duration)), "
        + "\(Terminal.size(imageBytes))")
    guard isLive || isIncremental || filled.writing != nil else { return }
    let pause = report.pause
    var parts = [
      "stopping \(Terminal.duration(pause.stopping))",
      "state \(Terminal.duration(pause.savingState))",
      "tracking \(Terminal.duration(pause.tracking))",
    ]
    if !isLive { parts.append("copying \(Terminal.duration(pause.copying))") }
    parts.append("resuming \(Terminal.duration(pause.resuming))")
    print("  paused for \(Terminal.duration(pause.total)): " + parts.joined(separator: ", "))
    if isLive {
      print(
        "  protected ahead in \(Terminal.duration(report.arming)); \(report.copiedFirst) pages "
          + "copied before a write, \(report.stalls) stalls")
    }
    if let before = pagesPerSecondBefore, let during = pagesPerSecondDuring {
      print(
        "  the guest wrote \(Int(during)) pages/s meanwhile, \(Int(before)) before "
          + "(\(Int(during / max(before, 1) * 100)) %)")
    }
  }
}
