// Package bandwidth shares one budget of a site's link among all who send into storage.
//
// The budget is a [Schedule]: windows of the week with a rate each, kept by the scheduler in bucket "sites". Every worker
// of the site (role ship of an uploader, a resync-engine) runs a [Follower]: it watches the schedule, says in bucket
// "flows" how many streams of which class it has ([TransferDemand]), sees what the others say, and takes the part that
// [Shares] gives it. There is no master: all compute the same from the same records. The part goes to the worker's
// [Limiter], which holds back the reads of the bodies that [Store] puts, so that what is counted is what the link carries.
//
// What is promised: the parts of all workers together are never above the rate, once all have seen each other's records
// (a fraction of a second after a change, as long as the bus is there). Deltas go before copies and
// resynchronisations, of which each class has at least a tenth of the rate while it has something to send. A class's
// part that a worker does not use is used by the worker's other classes. The bus away, the last known schedule and the last
// known others hold. A site without a schedule pays an atomic load a read.
//
// [TransferDemand]: github.com/landfall-dr/landfall/proto/gen/landfall/uploader/v1
package bandwidth
