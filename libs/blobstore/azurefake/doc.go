// Package azurefake is an in-process server that speaks the Azure Blob REST protocol as azblob v1.8.3 uses it, and enforces
// what the emulator Azurite does not.
//
//	s := azurefake.New(azurefake.Options{})
//	s.Start(t)
//	client, err := azblob.NewClientFromConnectionString(s.ConnectionString(), nil)
//
// The server holds one account. Its errors have the status, the code (header x-ms-error-code and XML body) and the order of
// checks of the service as its REST reference describes them. Where the reference is silent the choice is marked (assumed).
//
// # Imitated, and the page of the REST reference that says so
//
//   - Authorize with Shared Key: signature verified, x-ms-date at most 15 minutes off, else 403 AuthenticationFailed.
//     Create an account SAS, a service SAS, a user delegation SAS: signature, st, se, sp, ss, srt, spr verified; 403
//     AuthenticationFailed, AuthorizationPermissionMismatch, -ResourceTypeMismatch, -ServiceMismatch, -ProtocolMismatch; an
//     overwrite with create rights alone is 403 UnauthorizedBlobOverwrite.
//     Authorize with Microsoft Entra ID: bearer tokens of Options.Principals with the data actions of "Permissions for calling
//     data operations" per container and blob prefix: 403 AuthorizationPermissionMismatch; an unknown token is 401
//     InvalidAuthenticationInfo; tokens over http are refused.
//   - Put Page: 512 alignment (416 InvalidPageRange), at most 4 MiB (413 RequestBodyTooLarge), never across the end (416
//     InvalidPageRange, assumed), Content-MD5 (400 Md5Mismatch) and x-ms-content-crc64 (400 Crc64Mismatch), sequence number
//     conditions (412 SequenceNumberConditionNotMet). Get Page Ranges: merged, paged (10,000 at most), diff by prevsnapshot
//     with clear ranges (PreviousSnapshotNotFound, PreviousSnapshotCannotBeNewer, BlobOverwritten).
//     Set Blob Properties: resize, sequence number max, update, increment.
//   - Snapshot Blob: unique ids in rising order; a write to a snapshot's URL is 400 InvalidQueryParameterValue (the code is
//     assumed, the status and the rule are documented).
//   - Put Blob, Put Block, Put Block List, Get Block List, Get Blob, Get Blob Properties, Delete Blob (409 SnapshotsPresent),
//     Set Blob Metadata, List Blobs (prefix, delimiter, marker, maxresults, startFrom, include), List Containers, Create,
//     Delete (409 ContainerBeingDeleted for 30 s), Get Container Properties, Get Blob Service Properties, Get Account
//     Information, Get User Delegation Key.
//   - Lease Blob, Lease Container: every action and the tables of outcomes, by Options.Now. Which 409 an action on an available
//     lease gives is assumed: LeaseNotPresentWithLeaseOperation.
//   - Specifying conditional headers: If-Match, If-None-Match, If-(Un)Modified-Since; 412 ConditionNotMet, 304 on reads, 409
//     BlobAlreadyExists for a create-only Put Blob.
//   - Immutable storage, container level (SetWriteOnce): 409 BlobImmutableDueToPolicy, or BlobImmutableDueToLegalHold, for
//     overwrite, Put Page, Set Blob Metadata, Set Blob Properties and Snapshot Blob even after expiry, and for delete before it.
//   - Scalability targets for page blobs: 500 requests/s and 60 MiB/s a blob, 503 ServerBusy above. How big a burst the
//     service lets pass is not documented: LimitBurst, a quarter of a second.
//   - A full account: what the service answers is not documented. Assumed is 409 AccountCapacityExceeded; FullStatus and
//     FullCode change it.
//
// # Not imitated
//
// Copy Blob and every ...FromURL call, append blobs, tiers, tags, batch, versions (only their header, with Versioning), soft
// delete (only reported), undelete, stored access policies, customer keys and encryption scopes, structured-message bodies,
// CORS, static sites, logging, geo-replication. These are refused (501 or 400), never ignored in silence.
//
// # Faults, shaping, a sink
//
// Options.Intercept decides per request on a refusal, a connection reset before or after the effect, a delay, or a flipped bit
// in the answer. Latency and Bandwidth shape. Discard keeps sizes and ranges and no bytes: the sink of benchmarks. Counters
// are in Stats. Intercept and Options.Now are called from many goroutines at once.
package azurefake
