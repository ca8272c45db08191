// SPDX-License-Identifier: Apache-2.0

internal import LinuxSystem
internal import SystemPackage
internal import Userfault

/// What the two trackers with a userfaultfd share.
enum UserfaultTracking {
  /// 4 KiB pages that are protected in one call: 4 MiB, for which nobody waits long (60 to
  /// 150 µs). Larger pieces are not faster.
  static let piecePages = 1024

  /// The features that some memory needs.
  static func features(
    _ method: DirtyTrackingMethod, _ backings: some Sequence<MemoryBacking>
  ) -> UserfaultFeatures {
    var features: UserfaultFeatures = [.writeProtectFaults]
    if method == .async { features.insert(.writeProtectAsync) }
    for backing in backings {
      switch backing {
      case .anonymous: features.insert(.writeProtectUnpopulated)
      case .memfd, .hugetlb, .guestMemfd: features.insert(.writeProtectShmemHugetlbfs)
      }
    }
    return features
  }

  /// A userfaultfd on which all regions are registered for WP.
  static func makeUserfaultfd(
    _ method: DirtyTrackingMethod, _ layout: TrackedLayout
  ) throws(DirtyTrackingError) -> Userfaultfd {
    let userfaultfd: Userfaultfd
    do throws(UserfaultError) {
      userfaultfd = try Userfaultfd(requiring: features(method, layout.regions.map(\.backing)))
    } catch {
      throw DirtyTrackingError(
        .unavailable, "Tracking writes by \(method.rawValue): \(error)", errno: error.errno)
    }
    for region in layout.regions {
      // What was registered before a failure goes with the descriptor.
      do throws(Errno) {
        try userfaultfd.register(region.host, modes: .writeProtect)
      } catch .resourceBusy {
        throw DirtyTrackingError(
          .unavailable,
          "\(region.host) is registered with another userfaultfd, which serves its pages; track "
            + "the guest's writes with KVM (log or ring) or release the pager first",
          errno: .resourceBusy)
      } catch {
        throw DirtyTrackingError("Registering \(region.host) for write protection", error)
      }
    }
    return userfaultfd
  }

  /// Lifts all protection, then ends the registration.
  ///
  /// Unregistering lifts it too, but in one go during which no fault of the whole process
  /// is served: 16 ms for each GiB of 4 KiB pages.
  static func release(_ userfaultfd: borrowing Userfaultfd, _ layout: TrackedLayout) {
    layout.forEachPiece(of: 0..<layout.pageCount, piecePages: piecePages) { piece in
      try? userfaultfd.writeProtect(piece.host, enabled: false)
    }
    for region in layout.regions {
      // Fails where the owner has unmapped it: then there is nothing to release.
      try? userfaultfd.unregister(region.host)
    }
  }

  /// Why a method does not work for a kind of memory on this machine; `nil` when it does.
  static func unavailability(
    _ method: DirtyTrackingMethod, _ backing: MemoryBacking
  ) -> String? {
    if backing == .guestMemfd {
      return "vCPUs may write guest_memfd without going through the mapping that userfaultfd "
        + "watches"
    }
    do throws(UserfaultError) {
      let supported = try Userfaultfd.supportedFeatures()
      let missing = features(method, [backing]).subtracting(supported)
      return missing.isEmpty ? nil : "this kernel's userfaultfd lacks \(missing)"
    } catch {
      return error.description
    }
  }
}

extension DirtyTrackingMethod {
  /// Why one of userfaultfd's methods does not work for a kind of memory on this machine;
  /// `nil` when it does. KVM's methods are a matter of the virtual machine.
  public func userfaultUnavailability(for backing: MemoryBacking) -> String? {
    switch self {
    case .ring, .log: "\(rawValue) is a method of KVM"
    case .writeProtect, .async: UserfaultTracking.unavailability(self, backing)
    }
  }
}
