// SPDX-License-Identifier: Apache-2.0

internal import FoundationEssentials
internal import HandoverProtocol
public import LinuxSystem
internal import SystemPackage
public import Userfault

// PUT /snapshot/load with {"mem_backend": {"backend_type": "Uffd", "backend_path": SOCKET}}:
//
//   Firecracker                                    handler
//     │                                               │ binds SOCKET, listens
//     │ connect ─────────────────────────────────────▶│ who is it? (SO_PEERCRED, a pidfd)
//     │ sendmsg: JSON array of regions + userfaultfd ▶│ receive: checks, maps onto the image
//     │ keeps the socket open, says nothing more      │ serves faults
//     ┊ ends ────────────────────────────────────────▶┊ the pidfd becomes readable

/// The memory of a Firecracker that restores a snapshot (`docs/firecracker.md`).
///
/// The socket stays the caller's. Firecracker keeps its end open as long as it runs, and
/// sends nothing more.
@frozen
public struct FirecrackerHandover: ~Copyable, Sendable {
  /// What was handed over, in the order of the message; all with an offset.
  public let regions: [HandedRegion]
  /// Watches Firecracker's memory; the ranges are registered already (MISSING).
  public let userfaultfd: Userfaultfd
  /// Who connected.
  public let peer: PeerCredentials
  /// A pidfd of Firecracker.
  public let process: OwnedDescriptor

  /// Receives and checks a hand-over.
  ///
  /// Every descriptor that came is closed when this throws.
  ///
  /// - Parameters:
  ///   - socket: a connection that was accepted.
  ///   - allowedUsers: who may hand over; `nil` for everybody who could connect.
  ///   - stopSign: a descriptor that ends the wait when it can be read; -1 for none.
  public static func receive(
    on socket: borrowing UnixSocket, limits: HandoverLimits = HandoverLimits(),
    allowedUsers: Set<UInt32>? = nil, stopSign: CInt = -1
  ) throws(HandoverError) -> FirecrackerHandover {
    var inbox = HandoverInbox(.array, limits)
    let deadline = limits.deadline
    let sender = try Sender(socket, allowedUsers: allowedUsers)
    while true {
      if let handover = try take(from: &inbox, socket, sender, limits) { return handover }
      do throws(HandoverError) {
        try socket.awaitHandover(before: deadline, stopSign: stopSign)
      } catch {
        throw error.from(sender.credentials)
      }
      inbox.collect(from: socket)
    }
  }

  /// The same, of what a connection has collected (`HandoverConnection.collect`): never waits for
  /// the VMM.
  ///
  /// - Returns: `nil` when its message is not complete.
  public static func take(
    from connection: HandoverConnection, allowedUsers: Set<UInt32>? = nil
  ) throws(HandoverError) -> FirecrackerHandover? {
    let sender = try Sender(connection.socket, allowedUsers: allowedUsers)
    return try connection.withInbox { (inbox) throws(HandoverError) in
      try take(from: &inbox, connection.socket, sender, connection.limits)
    }
  }

  private static func take(
    from inbox: inout HandoverInbox, _ socket: borrowing UnixSocket, _ sender: Sender,
    _ limits: HandoverLimits
  ) throws(HandoverError) -> FirecrackerHandover? {
    do throws(HandoverError) {
      guard let message = try inbox.next() else { return nil }
      var descriptors = inbox.takeDescriptors()
      let regions = try HandedRegion.check(decode(message), limit: limits.regions)
      let userfaultfd = try receivedUserfaultfd(&descriptors)
      try HandedRegion.check(regions, against: userfaultfd)
      return FirecrackerHandover(
        regions: regions, userfaultfd: userfaultfd, peer: sender.credentials,
        process: try sender.openProcess(socket))
    } catch {
      throw error.from(sender.credentials)
    }
  }

  // MARK: - The message

  /// A region with Firecracker's names. `page_size_kib` is what versions from February 2024
  /// to March 2025 call `page_size`; in spite of its name it has bytes.
  private struct WireRegion: Decodable {
    var base_host_virt_addr: UInt64
    var size: UInt64
    var offset: UInt64
    var page_size: UInt64?
    var page_size_kib: UInt64?
  }

  private static func decode(_ message: [UInt8]) throws(HandoverError) -> [ClaimedRegion] {
    let list: [WireRegion]
    do {
      list = try JSONDecoder().decode([WireRegion].self, from: Data(message))
    } catch {
      throw HandoverError(ProtocolError(decoding: error))
    }
    var claims: [ClaimedRegion] = []
    for (number, region) in list.enumerated() {
      if let new = region.page_size, let old = region.page_size_kib, new != old {
        throw HandoverError(
          .malformed, "page_size is \(new) and page_size_kib \(old)", region: number)
      }
      claims.append(
        ClaimedRegion(
          host: region.base_host_virt_addr, length: region.size, position: region.offset,
          scale: .offset, pageSize: region.page_size ?? region.page_size_kib ?? 4096))
    }
    return claims
  }
}
