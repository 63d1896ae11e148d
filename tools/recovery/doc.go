// Package recovery brings machines back from storage alone: no event server, no
// host, no scheduler, no records but what the storage account holds. It is what
// `landfall recover --from-storage` does (docs/operations/recover-from-storage.md).
//
// It reads the chain of each lineage (libs/replica), which is enough by itself,
// and the catalogue (libs/catalogue) for names, policies and plans. A machine that
// the catalogue does not know, or whose record is damaged, is found by its journal
// container and named by the configuration that its newest point carries.
//
// It writes nothing to storage, with one exception that the caller asks for by
// TakeOver: the `close` of the lineage, before anything else is done. From then on
// nothing that the source sends counts. Read-only credentials are enough without
// it. A reader without rights to write cannot pin its point; retention may take
// the point away while it is read (RETIRED, and another point works). With TakeOver
// the lineage stands still.
//
// Copies are made by the same targets, and by the same steps, as those of a failover:
// Check, Claim, Sink, Describe, Boot. The folder's marker names the recovery, by an id
// that says which point of which lineage it is, so that the same command goes on
// where it was interrupted: what is complete is left alone, anything else is
// written again from its beginning.
package recovery
